"""The weight of a head that is held in few bits, for who multiplies with it some rows at a time.

TRL's trainers read ``lm_head.weight`` and take ``weight[start:end]``, a stretch of the vocabulary after another, so
that no logits are there as a whole. These rows are made dense when they are asked for. Its shape, dtype and device can
be asked for as well, and ``torch.nn.functional.linear`` multiplies with it; for anything else the whole would have to
be dense, and that is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..storage.stored_matrix import StoredMatrix, dense_rows

_KEEPING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class RowsOnDemand(Tensor):
    """A matrix (rows, columns) without memory of its own.

    Args:
        stored: what holds it.
        dtype: of the rows that are made.
        linear: x, bias -> x Wᵀ + bias.
        refuse: raises an error that says what else to do.
    """

    stored: StoredMatrix
    linear: Callable[[Tensor, Tensor | None], Tensor]
    refuse: Callable[[], Any]

    @staticmethod
    def __new__(
        cls,
        stored: StoredMatrix,
        dtype: torch.dtype,
        linear: Callable[[Tensor, Tensor | None], Tensor],
        refuse: Callable[[], Any],
    ) -> RowsOnDemand:
        layout, device = stored.layout, stored.parts()[0].device
        made: RowsOnDemand = Tensor._make_wrapper_subclass(
            cls, (layout.rows, layout.columns), dtype=dtype, device=device, requires_grad=False
        )
        made.stored, made.linear, made.refuse = stored, linear, refuse
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RowsOnDemand({tuple(self.shape)}, dtype={self.dtype}, {self.stored.bits} bits)"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[0], cls) and isinstance(args[1], slice):
            return args[0]._rows(args[1])
        if func is functional.linear and isinstance(args[1], cls):
            return args[1].linear(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What computes with all of it."""
        one = next((one for one in (*args, *(kwargs or {}).values()) if isinstance(one, cls)), None)
        if one is not None and func in _KEEPING:
            return cls(one.stored, one.dtype, one.linear, one.refuse)
        if one is not None:
            one.refuse()
        raise TypeError(f"{func}: cannot be computed with a matrix whose rows are made on demand")

    def _rows(self, index: slice) -> Tensor:
        parts = tuple(part[index] for part in self.stored.parts())
        return dense_rows(self.stored.layout, parts, self.dtype)
