"""z = N h for a banded M: small dense blocks with a halo of d on each side, one batched product.

band[i, t] = M[i, i + t - d]      (k, 2d + 1), zero outside of the matrix
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .coefficients import (
    ROUNDED,
    TOKENS,
    Scale,
    ScaleSide,
    accumulator,
    keep,
    save_for_backward,
    saved,
    whole_stretches,
)

_BLOCK = 64


def _holes(row: int, rank: int, off_diagonals: int) -> tuple[int, int]:
    """How many of the 2d+1 places of a row fall outside the matrix, on the left and on the right."""
    return max(0, off_diagonals - row), max(0, row + off_diagonals - (rank - 1))


def _whole_rows(rank: int, off_diagonals: int) -> tuple[int, int]:
    """[first, last): the rows that have all their 2d+1 entries."""
    first = min(off_diagonals, rank)
    return first, max(first, rank - off_diagonals)


def _stretches(rank: int, off_diagonals: int) -> list[int]:
    """How long the stretches of a flat band are that lie outside of the matrix and inside of it, in turns."""
    first, last = _whole_rows(rank, off_diagonals)
    width, lengths = 2 * off_diagonals + 1, [0]
    for row in (*range(first), None, *range(last, rank)):
        left, right = (0, 0) if row is None else _holes(row, rank, off_diagonals)
        lengths[-1] += left
        lengths += [(last - first) * width if row is None else width - left - right, right]
    return lengths


def band_from_values(values: Tensor, rank: int, off_diagonals: int) -> Tensor:
    """Lay the entries (row-major, 1-D) out as a band (k, 2d+1): band[i, t] = M[i, i + t - d].

    Places outside the matrix hold zero. Built by one concatenation, so that it works under
    torch.compile and on meta tensors.
    """
    lengths = _stretches(rank, off_diagonals)
    outside, inside = lengths[::2], lengths[1::2]
    zeros = values.new_zeros(sum(outside)).split(outside)
    pieces = [piece for pair in zip(zeros, values.split(inside), strict=False) for piece in pair]
    return torch.cat([*pieces, zeros[-1]]).view(rank, -1)


def values_from_band(band: Tensor, off_diagonals: int) -> Tensor:
    """The inverse of :func:`band_from_values`: drop the places outside the matrix."""
    return torch.cat(band.reshape(-1).split(_stretches(band.shape[0], off_diagonals))[1::2])


def _block_size(off_diagonals: int) -> int:
    return _BLOCK * max(1, -(-2 * off_diagonals // _BLOCK))


def _dense_blocks(band: Tensor, off_diagonals: int) -> Tensor:
    """(k, 2d+1) -> (k/B, B, B+2d): each block of B rows as the dense matrix over its columns and halo.

    Row r of a block is the band's row shifted right by r. Padding each row to one more than the
    block's width and reading the flat memory at the width does the shift without an index.
    """
    rank = band.shape[0]
    block = _block_size(off_diagonals)
    count, width = -(-rank // block), block + 2 * off_diagonals
    padded = F.pad(band, (0, block, 0, count * block - rank))
    return padded.reshape(count, block * (width + 1))[:, : block * width].reshape(count, block, width)


def _band_from_blocks(blocks: Tensor, rank: int, off_diagonals: int) -> Tensor:
    """The inverse reading of :func:`_dense_blocks`: cut the band out of the dense blocks."""
    count, block, width = blocks.shape
    flat = F.pad(blocks.reshape(count, block * width), (0, block))
    return flat.reshape(count * block, width + 1)[:rank, : 2 * off_diagonals + 1]


def _transposed_band(band: Tensor, off_diagonals: int) -> Tensor:
    """The band of Mᵀ: bandT[j, t] = M[j + t - d, j] = band[j + t - d, 2d - t]."""
    rank, width = band.shape
    padded = F.pad(band.flip(1), (0, 0, off_diagonals, off_diagonals))
    return padded.as_strided((rank, width), (width, width + 1))


def _windows(h: Tensor, off_diagonals: int) -> Tensor:
    """(t, k) -> (k/B, t, B+2d): the columns each block of rows reads."""
    rank = h.shape[1]
    block = _block_size(off_diagonals)
    count = -(-rank // block)
    padded = F.pad(h, (off_diagonals, count * block - rank + off_diagonals))
    # A copy: batched products of overlapping views are several times slower on CPUs.
    return padded.unfold(1, block + 2 * off_diagonals, block).transpose(0, 1).contiguous()


def _blocked(g: Tensor, off_diagonals: int) -> Tensor:
    """(t, k) -> (k/B, t, B), padded with zeros to whole blocks."""
    tokens, rank = g.shape
    block = _block_size(off_diagonals)
    count = -(-rank // block)
    missing = count * block - rank
    whole = F.pad(g, (0, missing)) if missing else g  # padding by nothing would copy
    return whole.reshape(tokens, count, block).transpose(0, 1).contiguous()


def _banded_product(h: Tensor, band: Tensor, off_diagonals: int) -> Tensor:
    blocks = _dense_blocks(band, off_diagonals).transpose(1, 2)
    count, block = blocks.shape[0], blocks.shape[2]
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    for start in range(0, h.shape[0], TOKENS):
        rows, target = h[start : start + TOKENS], out[start : start + TOKENS]
        product = torch.bmm(_windows(rows, off_diagonals), blocks).transpose(0, 1)
        if count * block == h.shape[1]:  # whole blocks, which go to their places in one copy
            target.view(product.shape).copy_(product)
        else:
            target.copy_(product.reshape(rows.shape[0], -1)[:, : h.shape[1]])
    return out


def _banded_gradient(g: Tensor, h: Tensor, off_diagonals: int) -> Tensor:
    """dL/dN on the band, (k, 2d+1).

    A product of low precision is rounded once per ROUNDED tokens and summed in fp32, all stretches of a chunk in
    one batched product.
    """
    rank, dtype = h.shape[1], accumulator(h.dtype)
    block = _block_size(off_diagonals)
    total = h.new_zeros((-(-rank // block), block, block + 2 * off_diagonals), dtype=dtype)
    for start in range(0, h.shape[0], TOKENS):
        g_rows, h_rows = (whole_stretches(t[start : start + TOKENS]) for t in (g, h))
        length = min(ROUNDED, g_rows.shape[0])
        outputs = _blocked(g_rows, off_diagonals).view(-1, length, block)
        windows = _windows(h_rows, off_diagonals).view(outputs.shape[0], length, -1)
        parts = torch.bmm(outputs.transpose(1, 2), windows)
        total = total + parts.view(total.shape[0], -1, *total.shape[1:]).sum(1, dtype=dtype)
    return _band_from_blocks(total, rank, off_diagonals)


def _diagonal_gradient(g: Tensor, h: Tensor) -> Tensor:
    total = h.new_zeros(h.shape[1], dtype=accumulator(h.dtype))
    for start in range(0, h.shape[0], TOKENS):
        chunk = slice(start, start + TOKENS)
        total = total + (g[chunk].to(total.dtype) * h[chunk].to(total.dtype)).sum(0)
    return total.unsqueeze(1)


def _scaled_band(band: Tensor, scale: Scale, side: ScaleSide, off_diagonals: int) -> Tensor:
    if scale is None:
        return band
    if isinstance(scale, float):
        return band.mul_(scale)  # freshly made
    scale = scale.to(band.dtype)
    if side == "rows":
        return band * scale.unsqueeze(1)
    padded = F.pad(scale, (off_diagonals, off_diagonals))
    return band * padded.unfold(0, 2 * off_diagonals + 1, 1)


class _BandedCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        values: Tensor,
        scale: Scale,
        side: ScaleSide,
        off_diagonals: int,
    ) -> Tensor:
        save_for_backward(ctx, h, values, scale)
        ctx.side, ctx.off_diagonals = side, off_diagonals
        band = _scaled_band(band_from_values(values, h.shape[1], off_diagonals), scale, side, off_diagonals)
        band = band.to(h.dtype)
        return h * band[:, 0] if off_diagonals == 0 else _banded_product(h, band, off_diagonals)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, values, scale = saved(ctx)
        d, side = ctx.off_diagonals, ctx.side
        grad_h = grad_values = None
        if ctx.needs_input_grad[0]:
            band = _scaled_band(band_from_values(values, h.shape[1], d), scale, side, d).to(g.dtype)
            grad_h = g * band[:, 0] if d == 0 else _banded_product(g, _transposed_band(band, d), d)
        if ctx.needs_input_grad[1]:
            grad_band = _diagonal_gradient(g, h) if d == 0 else _banded_gradient(g, h, d)
            grad_band = _scaled_band(grad_band, scale, side, d)
            grad_values = values_from_band(grad_band, d).to(values.dtype)
        return grad_h, grad_values, None, None, None


def banded_coefficients(
    h: Tensor,
    values: Tensor,
    off_diagonals: int,
    scale: Scale = None,
    scale_side: ScaleSide = "rows",
) -> Tensor:
    """z = N h for a banded M with d off-diagonals on each side.

    Args:
        h: (tokens, k), any floating dtype.
        values: the k(2d+1) - d(d+1) entries of M, row-major.
        off_diagonals: d, 0 for the plain (diagonal) pattern.
        scale: (k,), a number or None.
        scale_side: whether ``scale`` multiplies the rows or the columns of M.

    Returns:
        (tokens, k), in the dtype of h.
    """
    result: Tensor = _BandedCoefficients.apply(keep(h), values, scale, scale_side, off_diagonals)
    return result
