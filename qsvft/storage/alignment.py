"""The weights of a model at addresses to compute with; see :mod:`qsvft.maths.aligned`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..maths.aligned import aligned


def align_tensors(model: nn.Module, odd_only: bool = False) -> None:
    """Put every parameter and buffer of a model, and what bitsandbytes keeps beside its weights, at such an address.

    Args:
        model: changed in place; what lies well is not copied.
        odd_only: leave what a processor can read where it is, see :func:`~qsvft.maths.aligned.aligned`.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if (moved := aligned(tensor.data, odd_only)).data_ptr() != tensor.data_ptr():
            tensor.data = moved
        _align_attributes(tensor, ("SCB",), odd_only)
        state: Any = getattr(tensor, "quant_state", None)
        while state is not None:
            _align_attributes(state, ("absmax", "code", "offset"), odd_only)
            state = state.state2


def _align_attributes(holder: Any, names: tuple[str, ...], odd_only: bool) -> None:
    for name in names:
        if isinstance(value := getattr(holder, name, None), Tensor):
            setattr(holder, name, aligned(value, odd_only))
