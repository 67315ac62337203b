"""An activation that may be changed in place: Wav2Vec2 and others write into what a layer gives.

What a custom autograd function gives as a view, as bitsandbytes' product does of rows in three dimensions, torch does
not let anyone write into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def of_its_own(y: Tensor) -> Tensor:
    """y with the same memory and gradient, but a view of nothing. y itself is not to be used any more."""
    if not y.requires_grad or torch.compiler.is_compiling():
        return y
    own: Tensor = _Own.apply(y)
    return own


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g
