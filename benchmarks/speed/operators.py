"""Which operators a forward and a backward run: matrix products, copies, looks at values from the host, and all.

Counted as torch dispatches them, below autograd and autocast. bitsandbytes' product with a 4-bit weight is one product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "bitsandbytes.gemm_4bit")
COPIES = ("aten.copy_", "aten._to_copy", "aten.clone", "aten.contiguous")
LOOKS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero", "aten.equal")
"""What makes a processor wait for a card."""

MOST = {
    "qsvft": 80,
    "qsvft:factor_bits=16": 56,
    "qsvft:factor_bits=4": 92,
    "qsvft:basis=data,residual=true": 99,
    "qsvft:sides=one,pattern=banded": 114,
    "qsvft:sides=one,pattern=banded,factor_bits=4": 150,
    "qsvft:sides=both,pattern=banded,rank=full": 110,
    "qsvft:sides=one,pattern=plain": 69,
    "qsvft:pattern=plain,sides=both,rank=full": 64,
    "svft": 27,
    "svft-authors": 26,
}
"""Operators, views among them, that a forward and a backward of one layer on at most 512 tokens may take. Products and
copies follow from the mathematics, see parts.py; the rest is reshaping, and grows only where somebody means it to."""


class Operators(TorchDispatchMode):
    """Counts the operators that run while it is on, by name and without their overloads."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))

    def of(self, names: tuple[str, ...]) -> int:
        """How many of these ran."""
        return sum(self.counts[name] for name in names)


@dataclass(frozen=True)
class Counts:
    """What one run takes: flops of its matrix products, and operators."""

    flops: int
    products: int
    copies: int
    looks: int
    total: int


def counted(run: Callable[[], Any]) -> Counts:
    """What a run of this takes."""
    operators = Operators()
    with FlopCounterMode(display=False, custom_mapping=_MAPPING) as flops, operators:
        run()
    total = sum(operators.counts.values())
    of = operators.of
    return Counts(flops.get_total_flops(), of(PRODUCTS), of(COPIES), of(LOOKS), total)


def forward_and_backward(layer: Any, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """A call of a layer and its backward, under bf16 autocast, from gradients that are not there."""

    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            y = layer(x)
        y.backward(gradient)

    return run


def _gemm_4bit_flops(a_shape: Any, b_shape: Any, shape: Any, *args: Any, **kwargs: Any) -> int:
    tokens = 1
    for size in a_shape[:-1]:
        tokens *= size
    return int(2 * tokens * shape[0] * shape[1])


_MAPPING = {torch.ops.bitsandbytes.gemm_4bit: _gemm_4bit_flops} if hasattr(torch.ops.bitsandbytes, "gemm_4bit") else {}
