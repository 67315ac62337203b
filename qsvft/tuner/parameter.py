"""M's values: a parameter that stays fp32 whatever is assigned to its ``data``.

Trainers cast trainable parameters with ``param.data = param.data.to(torch.bfloat16)`` when the base is
quantised (TRL does), and ``model.to(dtype)`` does the same. In bf16 a step of 1e-4 on an M of 0.3 moves
nothing at all. A cast that carries no new value is therefore ignored; new values are taken as fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Float32Parameter(nn.Parameter):
    """An ``nn.Parameter`` in fp32 whose ``data`` cannot lose precision by a cast."""

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True, **_: Any) -> Float32Parameter:
        data = torch.empty(0, dtype=torch.float32) if data is None else data.detach().to(torch.float32)
        return super().__new__(cls, data, requires_grad)

    @property
    def data(self) -> Tensor:
        """The values, detached."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype != torch.float32:
            value = self._keep_or_take(value)
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def _keep_or_take(self, value: Tensor) -> Tensor:
        """The present values on value's device if ``value`` is only their rounding, else value in fp32."""
        present = self.data
        if present.shape == value.shape and not value.is_meta and not present.is_meta:
            moved = present.to(value.device)
            if torch.equal(moved.to(value.dtype), value):
                return moved
        return value.to(torch.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> Float32Parameter:
        if id(self) not in memo:
            memo[id(self)] = type(self)(self.data.clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.data, self.requires_grad)
