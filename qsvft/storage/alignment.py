"""The tensors of a model in memory of its own, and at addresses to compute with; see :mod:`qsvft.maths.aligned`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..maths.aligned import aligned
from .packed import is_packed_tensor


def align_tensors(model: nn.Module, odd_only: bool = False) -> None:
    """Put every parameter and buffer of a model, and what bitsandbytes keeps beside its weights, at such an address.

    Args:
        model: changed in place; what lies well is not copied.
        odd_only: leave what a processor can read where it is, see :func:`~qsvft.maths.aligned.aligned`.
    """
    _move(model, partial(aligned, odd_only=odd_only))


def own_tensors(model: nn.Module) -> None:
    """Copy the same from where a file is mapped into memory: who writes into the file must not change the model.

    Args:
        model: changed in place, one tensor after the other; what is on a card is a copy already.
    """
    _move(model, lambda tensor: tensor.clone() if tensor.device.type == "cpu" else tensor)


def _move(model: nn.Module, moved: Callable[[Tensor], Tensor]) -> None:
    every: tuple[Any, ...] = (*model.parameters(), *model.buffers())
    for tensor in every:
        if is_packed_tensor(tensor):
            continue
        if (new := moved(tensor.data)).data_ptr() != tensor.data_ptr():
            tensor.data = new
            if getattr(tensor, "CB", None) is not None:  # of an int8 weight: the same rows again
                tensor.CB = new
        _move_attributes(tensor, ("SCB",), moved)
        state: Any = getattr(tensor, "quant_state", None)
        while state is not None:
            _move_attributes(state, ("absmax", "code", "offset"), moved)
            state = state.state2


def _move_attributes(holder: Any, names: tuple[str, ...], moved: Callable[[Tensor], Tensor]) -> None:
    for name in names:
        if isinstance(value := getattr(holder, name, None), Tensor):
            setattr(holder, name, moved(value))
