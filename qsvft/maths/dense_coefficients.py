"""z = N h for a dense M: plain matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .coefficients import (
    ROUNDED,
    Scale,
    ScaleSide,
    accumulator,
    keep,
    save_for_backward,
    saved,
    whole_stretches,
)

_ENTRIES = 2**20
"""Of the parts of a sum that stand there at once."""


def scaled(M: Tensor, scale: Scale, side: ScaleSide) -> Tensor:
    """N, or from the gradient of N that of M: the same factors."""
    if scale is None:
        return M
    if isinstance(scale, float):
        return M * scale
    scale = scale.to(M.dtype)
    return M * (scale.unsqueeze(1) if side == "rows" else scale)


def dense_gradient(g: Tensor, h: Tensor) -> Tensor:
    """dL/dN = gᵀ h, (k, k) in fp32 (fp64 for fp64): rounded once per stretch of tokens, where the device rounds."""
    dtype = accumulator(h.dtype)
    if h.dtype == dtype:
        return g.t() @ h
    if h.is_cuda and not torch.is_grad_enabled():  # it has no derivative of its own
        return torch.mm(g.t(), h, out_dtype=dtype)
    rank, most = h.shape[1], ROUNDED * max(1, _ENTRIES // h.shape[1] ** 2)
    total = h.new_zeros((rank, rank), dtype=dtype)
    for start in range(0, h.shape[0], most):
        g_rows, h_rows = (whole_stretches(t[start : start + most]) for t in (g, h))
        length = min(ROUNDED, g_rows.shape[0])
        parts = torch.bmm(g_rows.reshape(-1, length, rank).transpose(1, 2), h_rows.reshape(-1, length, rank))
        total += parts.sum(0, dtype=dtype)
    return total


class _DenseCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, values: Tensor, scale: Scale, side: ScaleSide) -> Tensor:
        save_for_backward(ctx, h, values, scale)
        ctx.side = side
        N = scaled(values.view(h.shape[1], -1), scale, side).to(h.dtype)
        return h @ N.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, values, scale = saved(ctx)
        grad_h = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_h = g @ scaled(values.view(h.shape[1], -1), scale, ctx.side).to(g.dtype)
        if ctx.needs_input_grad[1]:
            grad_values = scaled(dense_gradient(g, h), scale, ctx.side).to(values.dtype).view(-1)
        return grad_h, grad_values, None, None


def dense_coefficients(h: Tensor, values: Tensor, scale: Scale = None, scale_side: ScaleSide = "rows") -> Tensor:
    """z = N h for a dense M.

    Args:
        h: (tokens, k), any floating dtype.
        values: the k * k entries of M, row-major.
        scale, scale_side: as in :func:`qsvft.maths.banded_coefficients.banded_coefficients`.

    Returns:
        (tokens, k), in the dtype of h.
    """
    result: Tensor = _DenseCoefficients.apply(keep(h), values, scale, scale_side)
    return result
