"""The dtypes in which products are taken, with autocast and without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_compute_dtype(a: Tensor, run: Callable[[Tensor], Tensor], products_alone: bool = False) -> Tensor:
    """run(a) in a's dtype, or under autocast in autocast's dtype where a is fp32.

    ``products_alone`` says that run takes matrix products in the dtype of what it gets and nothing else that autocast
    has an opinion on: where that is autocast's own dtype, autocast may stay on, and turning it off costs nothing.
    """
    kind = a.device.type
    if a.is_meta or not torch.is_autocast_enabled(kind):
        return run(a)
    lower = torch.get_autocast_dtype(kind)
    compute = lower if a.dtype == torch.float32 else a.dtype
    if products_alone and compute == lower:
        return run(a.to(compute))
    with torch.autocast(kind, enabled=False):
        return run(a.to(compute))


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` takes this activation's product: autocast's where autocast is on."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
