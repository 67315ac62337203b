"""z = N h for any list of entries of M, in compressed rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .coefficients import TOKENS, Scale, ScaleSide, accumulator, keep, save_for_backward, saved

_ENTRIES = 4096


def _gathered(h: Tensor, values: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """z[:, i] = sum over the entries e of row i of values[e] * h[:, columns[e]]."""
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    for start in range(0, h.shape[0], TOKENS):
        chunk = slice(start, start + TOKENS)
        z = F.embedding_bag(
            columns,
            h[chunk].t().contiguous(),
            offsets,
            mode="sum",
            per_sample_weights=values,
            include_last_offset=True,
        )
        out[chunk] = z.t()
    return out


def _entry_gradient(g: Tensor, h: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """sum over tokens of g[:, rows] * h[:, columns], (entries,)."""
    dtype = accumulator(h.dtype)
    total = h.new_zeros(columns.shape[0], dtype=dtype)
    for start in range(0, h.shape[0], TOKENS):
        chunk = slice(start, start + TOKENS)
        g_rows, h_rows = g[chunk].t().contiguous(), h[chunk].t().contiguous()
        parts = [
            (g_rows[r].to(dtype) * h_rows[c].to(dtype)).sum(1)
            for r, c in zip(rows.split(_ENTRIES), columns.split(_ENTRIES), strict=True)
        ]
        total = total + torch.cat(parts)
    return total


class _IndexedCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        values: Tensor,
        scale: Scale,
        side: ScaleSide,
        columns: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        save_for_backward(ctx, h, values, scale)
        ctx.side, ctx.entries = side, (columns, offsets)
        if scale is not None:
            values = values * _entry_scale(scale, side, columns, offsets, values.dtype)
        return _gathered(h, values.to(h.dtype), columns, offsets)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, values, scale = saved(ctx)
        columns, offsets = ctx.entries
        entry_scale = None if scale is None else _entry_scale(scale, ctx.side, columns, offsets, values.dtype)
        rows = entry_rows(columns, offsets)
        grad_h = grad_values = None
        if ctx.needs_input_grad[0]:
            n_values = values if entry_scale is None else values * entry_scale
            order = torch.argsort(columns, stable=True)
            ones = torch.ones_like(columns)
            counts = columns.new_zeros(h.shape[1]).scatter_add(0, columns.long(), ones)
            starts = F.pad(counts.cumsum(0), (1, 0)).to(rows.dtype)
            grad_h = _gathered(g, n_values[order].to(g.dtype), rows[order], starts)
        if ctx.needs_input_grad[1]:
            grad = _entry_gradient(g, h, rows, columns)
            grad_values = (grad if entry_scale is None else grad * entry_scale).to(values.dtype)
        return grad_h, grad_values, None, None, None, None


def entry_rows(columns: Tensor, offsets: Tensor) -> Tensor:
    """The row of each entry, from the row offsets (k+1,)."""
    rank = offsets.shape[0] - 1
    rows = torch.arange(rank, dtype=columns.dtype, device=columns.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=columns.shape[0])


def _entry_scale(
    scale: Tensor | float, side: ScaleSide, columns: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor | float:
    if isinstance(scale, float):
        return scale
    return scale[entry_rows(columns, offsets) if side == "rows" else columns].to(dtype)


def indexed_coefficients(
    h: Tensor,
    values: Tensor,
    columns: Tensor,
    offsets: Tensor,
    scale: Scale = None,
    scale_side: ScaleSide = "rows",
) -> Tensor:
    """z = N h for M given by a list of entries, row-major (compressed rows).

    Args:
        h: (tokens, k).
        values: (entries,), the entries of M.
        columns: (entries,) int32 or int64, the column of each entry.
        offsets: (k+1,) of the same dtype, where each row starts.
        scale, scale_side: as in :func:`banded_coefficients`.

    Returns:
        (tokens, k), in the dtype of h.
    """
    result: Tensor = _IndexedCoefficients.apply(keep(h), values, scale, scale_side, columns, offsets)
    return result
