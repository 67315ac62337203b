"""Autocast as it was in a forward, for what a backward computes again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Autocast(NamedTuple):
    """Whether autocast was on for a kind of device, and with which dtype."""

    kind: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Autocast | None:
        """As it is now for this activation; None on the meta device, which has none."""
        kind = x.device.type
        return None if x.is_meta else cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))


def again(autocast: Autocast | None) -> AbstractContextManager[object]:
    """The same once more."""
    if autocast is None:
        return nullcontext()
    return torch.autocast(autocast.kind, dtype=autocast.dtype, enabled=autocast.enabled)
