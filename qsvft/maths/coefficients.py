"""What every product z = N h with the matrix of coefficients has in common: see banded, indexed and dense_coefficients.

N is k x k and sparse: N = diag(scale) M ("rows"), M diag(scale) ("columns") or M itself.
``values`` are the entries of M in row-major order, fp32; ``h`` is (tokens, k) in the compute dtype.

    z  = h Nᵀ,     dL/dh = g N,     dL/dM_ij = scale * sum over tokens of g_i h_j

Only h is kept for the backward, in the compute dtype; N is rebuilt there. N is cast down to the
dtype of h, h is never cast up. Sums over tokens run in chunks and accumulate in fp32 (fp64 for
fp64), so that temporaries stay at 512 rows whatever the sequence length.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ScaleSide = Literal["rows", "columns"]
Scale = Tensor | float | None
"""Of the rows or columns of M, (k,); or one number for all of M, which no tensor is kept for."""

TOKENS = 512
"""Rows of h at a time."""
ROUNDED = 256
"""Rows that a product in low precision sums before it is rounded; beyond them sums are taken in fp32."""


class _Kept(torch.autograd.Function):
    """h itself, which this node keeps for the backward of what reads it.

    A checkpoint recomputes a layer until its last saved tensor is there. With h saved here, ahead of the
    product, the recomputation of a last layer ends with h: no z, no product with the other factor.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        ctx.keeps_h = True
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def keep(h: Tensor) -> Tensor:
    kept: Tensor = h if torch.compiler.is_compiling() else _Kept.apply(h)
    return kept


def save_for_backward(ctx: Any, h: Tensor, values: Tensor, scale: Scale) -> None:
    """Save what a product's backward reads: h through the node that keeps it, where there is one."""
    node = None if torch.compiler.is_compiling() else h.grad_fn
    ctx.kept = node if getattr(node, "keeps_h", False) else None
    ctx.number = scale if isinstance(scale, float) else None
    if ctx.kept is None:
        ctx.save_for_backward(h, values, scale if isinstance(scale, Tensor) else None)
    else:
        # M and the scale are alive anyway; what saving M would add is this check.
        ctx.rest, ctx.version = (values, scale), values._version


def saved(ctx: Any) -> tuple[Tensor, Tensor, Scale]:
    if ctx.kept is None:
        h, values, scale = ctx.saved_tensors
        return h, values, scale if ctx.number is None else ctx.number
    values, scale = ctx.rest
    if values._version != ctx.version:
        raise RuntimeError("M was changed in place between the forward and the backward; step the optimizer afterwards")
    (h,) = ctx.kept.saved_tensors
    return h, values, scale


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def whole_stretches(rows: Tensor) -> Tensor:
    """Rows of zeros added, so that stretches of ROUNDED tokens come out even."""
    missing = -rows.shape[0] % ROUNDED if rows.shape[0] > ROUNDED else 0
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
