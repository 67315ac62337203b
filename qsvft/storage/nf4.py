"""A weight in NF4 with double quantisation: the same bits on any number of threads, and some times as fast.

Codes and layout are bitsandbytes'. Three things differ from ``bnb.functional.quantize_4bit``. The offset that double
quantisation takes from the blocks' absolute maxima, their mean, is summed in whole numbers: bitsandbytes sums it in
fp32, in an order that depends on the number of threads, so that two machines disagree in its last bits, with it in
every weight, and in the vectors of nearly equal singular values. The map of double quantisation is the same on every
processor (:mod:`qsvft.storage.dynamic_map`). And on the CPU a code is counted, how many thresholds lie below, where
bitsandbytes searches, some ten times slower; a stretch of the weight at a time, since the temporaries are ten times
its size in bf16.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import bitsandbytes as bnb
import numpy
import numpy.typing
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .dynamic_map import dynamic_map

BLOCK, NESTED_BLOCK = 64, 256
"""Elements that share a maximum, and maxima that share one of their own."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What the 16 codes stand for (arXiv 2305.14314, appendix E). bitsandbytes' table has the process's default dtype."""

FloatArray = numpy.typing.NDArray[numpy.float32]

_STRETCH = 2**18
"""Elements quantised at a time on the CPU: whole blocks, few enough for the caches."""

_LAUNCH = 2**30
"""The same on a card, where each stretch is a launch; bitsandbytes counts them in 32 bits."""

_FIXED = 40
"""Bits after the point of the maxima that are summed: those of a stretch fit into 63."""


def nf4_parameter(weight: Tensor) -> Any:
    """A frozen ``bnb.nn.Params4bit`` of a weight.

    Args:
        weight: (m, n), finite, in fp32, bf16 or fp16, not on meta.
    """
    codes, absmax = nf4_codes(weight.detach().reshape(-1), BLOCK)
    offset = _mean(absmax)
    code = dynamic_map().to(absmax.device)
    nested, nested_state = bnb.functional.quantize_blockwise(absmax - offset, code, blocksize=NESTED_BLOCK)
    state = QuantState(
        absmax=nested,
        shape=weight.shape,
        code=torch.tensor(NF4, dtype=torch.float32, device=weight.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=offset,
        state2=nested_state,
    )
    return bnb.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
    )


def _mean(maxima: Tensor) -> Tensor:
    """The mean of numbers of at least 0, to 2^-40 of the largest and rounded to fp32: in whole numbers any order of
    summation gives the same."""
    _, exponent = math.frexp(float(maxima.max()))
    scale = 2.0 ** (_FIXED - exponent)
    total = sum(int((part.double() * scale).round().long().sum()) for part in maxima.split(_STRETCH))
    mean = math.ldexp(total / maxima.numel(), exponent - _FIXED)
    return torch.tensor(mean, dtype=torch.float32, device=maxima.device)


def nf4_codes(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """bitsandbytes' NF4 codes, and the maxima that they are fractions of.

    Args:
        values: (n,), any floating dtype.
        block: how many share one maximum.

    Returns:
        Codes two a byte, the first in the upper four bits, (ceil(n/2), 1), and the blocks' absolute maxima in fp32.
    """
    size = _STRETCH if values.device.type == "cpu" else _LAUNCH
    codes, maxima = zip(*(_quantized(stretch, block) for stretch in values.split(size)), strict=True)
    return torch.cat(codes), torch.cat(maxima)


def quant_state(layer: bnb.nn.Linear4bit) -> Any:
    """The ``QuantState`` of a 4-bit layer's weight; where FSDP sharded that, the layer has it."""
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def packed_weight(layer: bnb.nn.Linear4bit) -> Tensor:
    """A 4-bit layer's weight with its quantisation state, which FSDP leaves at the layer as it gathers the weight."""
    fix_4bit_weight_quant_state_from_module(layer)
    return layer.weight


def dense_codes(codes: Tensor, absmax: Tensor, block: int, dtype: torch.dtype, kind: str = "nf4") -> Tensor:
    """The numbers that codes stand for, as bitsandbytes gives them.

    Args:
        codes: (rows, columns / 2) uint8, two a byte, the first in the upper four bits.
        absmax: the blocks' absolute maxima, fp32.
        block: elements that share one.
        dtype: of the result, bf16, fp16 or fp32.
        kind: "nf4" or "fp4".

    Returns:
        (rows, columns).
    """
    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    state = QuantState(absmax=absmax.reshape(-1), shape=shape, blocksize=block, quant_type=kind, dtype=dtype)
    values: Tensor = bnb.functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return values


def _quantized(stretch: Tensor, block: int) -> tuple[Tensor, Tensor]:
    if stretch.numel() % block or stretch.device.type != "cpu":
        packed, state = bnb.functional.quantize_4bit(stretch, blocksize=block, quant_type="nf4")
        return packed, state.absmax
    blocks = stretch.float().view(-1, block)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).view(-1)
    return _packed(scaled.numpy()), absmax


def _packed(scaled: FloatArray) -> Tensor:
    """The codes of numbers in [-1, 1]. numpy compares ten times as fast as torch."""
    above, codes = numpy.empty(scaled.size, numpy.bool_), numpy.zeros(scaled.size, numpy.uint8)
    for threshold in _thresholds():
        numpy.greater(scaled, threshold, out=above)
        codes += above.view(numpy.uint8)
    pairs = codes.view("<u2")  # the first code of a pair is in the lower byte
    return torch.from_numpy(((pairs << 4) | (pairs >> 8)).astype(numpy.uint8)).unsqueeze(1)


@cache
def _thresholds() -> FloatArray:
    """The middle between each two of the 16 numbers, in fp32."""
    numbers = numpy.array(NF4, numpy.float32)
    return (numbers[1:] + numbers[:-1]) / numpy.float32(2)


def empty_nf4_linear(layer: Any) -> nn.Module:
    """An NF4 layer of the shape of a linear layer on meta, with the tensors that bitsandbytes' quantiser makes."""
    n, m = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    dtype = layer.weight.dtype
    new = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    blocks = -(-m * n // BLOCK)

    def meta(count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    nested = QuantState(
        absmax=meta(-(-blocks // NESTED_BLOCK), torch.float32),
        code=meta(256, torch.float32),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=meta(blocks, torch.uint8),
        shape=torch.Size((m, n)),
        code=meta(16, torch.float32),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), dtype=torch.float32, device="meta"),
        state2=nested,
    )
    new.weight = bnb.nn.Params4bit(
        torch.empty((m * n + 1) // 2, 1, dtype=torch.uint8, device="meta"),
        requires_grad=False,
        quant_state=state,
        quant_type="nf4",
        bnb_quantized=True,
    )
    new.quant_state = state
    new.bias = layer.bias
    new.source_cls = type(layer)
    new.support_avx512bf16_for_cpu = False
    return new
