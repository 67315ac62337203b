"""What a machine can do, measured: its rate of bf16 matrix products and its bandwidth. A floor of times by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from clock import interleaved

SIZES = (1024, 2048, 4096)
COPIED = 2**28
"""Bytes of the tensor that is copied, more than any cache holds."""


@dataclass(frozen=True)
class Roof:
    """The fastest that was seen.

    Attributes:
        flops: of a bf16 matrix product, a second.
        bandwidth: of a copy, bytes read and written a second.
    """

    flops: float
    bandwidth: float

    def floor_ms(self, flops: float, nbytes: float) -> float:
        """Milliseconds below which neither the products nor the bytes can be done; one may hide behind the other."""
        return 1000 * max(flops / self.flops, nbytes / self.bandwidth)

    def to_dict(self) -> dict[str, float]:
        """For the results."""
        return asdict(self)


def measured(device: str, sizes: tuple[int, ...] = SIZES, copied: int = COPIED, rounds: int = 5) -> Roof:
    """The best of some rounds and of square products of these sizes."""
    steps: dict[str, Callable[[], Any]] = {}
    for size in sizes:
        a = torch.randn(size, size, device=device).to(torch.bfloat16)
        b, out = a.clone(), torch.empty_like(a)
        steps[str(size)] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    steps["copy"] = lambda: target.copy_(source)
    best = {name: min(times) / 1000 for name, times in interleaved(steps, rounds, device).items()}
    return Roof(max(2 * size**3 / best[str(size)] for size in sizes), 2 * copied / best["copy"])
