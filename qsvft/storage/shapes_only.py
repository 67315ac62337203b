"""Building adapters on the meta device, for counting bytes: shapes without values.

Outside this context a meta-device weight is refused, since there is nothing to decompose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BLOCK, NESTED_BLOCK = 64, 256

_ACTIVE: ContextVar[bool] = ContextVar("qsvft_shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let adapters be attached to weights without values; they get factors and M without values."""
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def shapes_only_active() -> bool:
    """Whether the code runs inside :func:`shapes_only`."""
    return _ACTIVE.get()


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
