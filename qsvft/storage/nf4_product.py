"""The product with a large NF4 weight in slices, so that the dense weight never stands there as a whole.

    y[:, rows] = x W[rows]ᵀ + b[rows]           forward
    dL/dx[:, columns] = g W[:, columns]         backward

bitsandbytes dequantises the whole weight for many tokens (112 MiB for 14336 x 4096 in bf16), twice a step.
Each slice is a product over the whole inner dimension, so nothing is summed in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from .nf4 import dense_codes, packed_weight
from .stored_matrix import slices

DENSE_BYTES = 32 * 2**20
"""Of a weight that is made dense at once. A card is faster with a product than Python with starting it: in slices of
8 MiB a step of Llama-3-8B took twice the time on an H200, for 24 MiB of 7 GiB."""

LEAST_TOKENS = 128
"""With fewer tokens bitsandbytes multiplies without making the weight dense, or the time goes into the slices."""


class SlicedLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit layer, whose product is taken in slices where it trains a large weight on many tokens."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = packed_weight(self)
        if not self._worth_slicing(x, weight.quant_state):
            return super().forward(x)
        inner = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        y: Tensor = _SlicedProduct.apply(inner.reshape(-1, x.shape[-1]), weight, weight.quant_state, bias)
        return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def _worth_slicing(self, x: Tensor, state: QuantState | None) -> bool:
        # bitsandbytes settles a layer's compute dtype in its first forward.
        settled = self.compute_type_is_set or self.compute_dtype is not None
        if state is None or not settled or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self.bias is not None and self.bias.requires_grad:
            return False
        m, n = state.shape
        fits = x.shape[-1] == n and n % state.blocksize == 0
        return fits and m * n * x.element_size() > DENSE_BYTES and x.numel() >= LEAST_TOKENS * n


def slice_products(layer: nn.Module) -> nn.Module:
    """Let a bitsandbytes 4-bit layer take its products in slices, in place."""
    if type(layer) is bnb.nn.Linear4bit:
        layer.__class__ = SlicedLinear4bit
    return layer


class _SlicedProduct(torch.autograd.Function):
    """W x + b from (tokens, n) to (tokens, m). Keeps a reference to the packed weight and no activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.state = weight, state
        m, n = state.shape
        y = x.new_empty(x.shape[0], m)
        codes, absmax = _codes(weight, m), block_maxima(state).view(m, -1)
        for rows in slices(m, n * x.element_size(), most=DENSE_BYTES):
            W = _dense(codes[rows], absmax[rows], state, x.dtype)
            torch.mm(x, W.t(), out=y[:, rows]) if bias is None else torch.addmm(bias[rows], x, W.t(), out=y[:, rows])
            del W  # before the next one is made
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight, state = ctx.weight, ctx.state
        if torch.is_grad_enabled() and g.requires_grad:  # of a second backward: what is written into ``out`` has none
            pieces = (g @ W for _, W in _by_columns(weight, state, g.dtype))
            return torch.cat(list(pieces), dim=1), None, None, None
        grad = g.new_empty(g.shape[0], state.shape[1])
        for columns, W in _by_columns(weight, state, g.dtype):
            torch.mm(g, W, out=grad[:, columns])
            del W  # before the next one is made
        return grad, None, None, None


def _by_columns(weight: Tensor, state: QuantState, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, W's dense part), one after the other."""
    m, n = state.shape
    codes, absmax = _codes(weight, m), block_maxima(state).view(m, -1)
    for columns in slices(n, m * dtype.itemsize, state.blocksize, DENSE_BYTES):
        packed = codes[:, columns.start // 2 : columns.stop // 2].contiguous()
        maxima = absmax[:, columns.start // state.blocksize : columns.stop // state.blocksize].contiguous()
        yield columns, _dense(packed, maxima, state, dtype)


def _codes(weight: Tensor, m: int) -> Tensor:
    """(m, n / 2) uint8, two a byte, whatever dtype the packed weight is stored in (``quant_storage``)."""
    return weight.data.view(torch.uint8).view(m, -1)


def block_maxima(state: QuantState) -> Tensor:
    """The absolute maximum of each block, fp32, double quantisation undone."""
    if not state.nested:
        return state.absmax
    maxima: Tensor = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
    return maxima + state.offset


def _dense(codes: Tensor, absmax: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """As bitsandbytes does it: dequantised to the weight's dtype, then to the activation's."""
    return dense_codes(codes, absmax, state.blocksize, state.dtype, state.quant_type).to(dtype)
