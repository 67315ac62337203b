"""M's values: a parameter that stays fp32 whatever is assigned to its ``data``, and the module that holds it.

Trainers cast trainable parameters with ``param.data = param.data.to(torch.bfloat16)`` when the base is
quantised (TRL does), and ``model.to(dtype)`` does the same. In bf16 a step of 1e-4 on an M of 0.3 moves
nothing at all. A cast that carries no new value is therefore ignored; new values are taken as fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..storage.weights import all_finite


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


class Coefficients(nn.Module):
    """The entries of one adapter's M, as ``weight``.

    A module of its own, so that the parameter's name holds the adapter's between dots and ends in ``.weight``, as
    LoRA's do: TRL copies what has ".default." in its name to a reference, FSDP's policy looks for a trained ``weight``.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight: nn.Parameter = Float32Parameter(values)
        self.register_load_state_dict_post_hook(_stay_float32)

    def forward(self, update: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``update(M, *inputs)``: within it M is whole where FSDP or ZeRO-3 has split it between processes."""
        return update(self.weight, *inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> Coefficients:
        """Move, but stay fp32, the gradient as well."""
        super()._apply(fn, recurse)
        if self.weight.grad is not None and self.weight.grad.dtype != self.weight.dtype:
            self.weight.grad = self.weight.grad.to(self.weight.dtype)
        _stay_float32(self)
        return self


def _stay_float32(held: nn.Module, *_: Any) -> None:
    """Loading with ``assign=True`` or moving to another backend makes a plain parameter of M."""
    weight = held.weight
    if type(weight) is nn.Parameter and weight.dtype == torch.float32:  # and no part of one, as FSDP2 has it
        held.weight = Float32Parameter(weight.data, weight.requires_grad)


def with_coefficients(key: str) -> str:
    """A tensor's name as it is today: M was ``<layer>.qsvft_M`` in a file, ``<layer>.qsvft_M.<adapter>`` in a state."""
    _, found, rest = key.rpartition(".qsvft_M")
    return f"{key}.weight" if found and rest.count(".") < 2 and not rest.endswith(".weight") else key


def check_finite(layer: str, adapter: str, M: Tensor) -> None:
    """Refuse an M that holds NaN or Inf; one without values passes."""
    if M.is_meta or all_finite(M):
        return
    bad = int((~torch.isfinite(M)).sum())
    raise ValueError(
        f"{layer}: M of adapter '{adapter}' holds {bad} NaN or Inf values of {M.numel()}; expected finite numbers. Its "
        "training diverged, or its file is damaged: take an earlier checkpoint, and train with a lower learning rate."
    )
