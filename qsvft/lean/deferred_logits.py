"""DeferredLogits: logits that are computed when someone looks at them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..maths.autocast import linear_dtype
from .cross_entropy import Head, LogitStep, Rows

_KNOWN = ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "is_floating_point")


class HeadCall:
    """A call of the head that can still be made, whole or in parts, in the autocast of its time.

    Attributes:
        hidden: (..., H), what it was called with.
        weight, bias: of a linear head, else None.
        dtype: of a linear head's logits.
    """

    def __init__(self, hidden: Tensor, head: nn.Module, forward: Any, linear: Any) -> None:
        self.hidden, self._head, self._forward = hidden, head, forward
        self.dtype, kind, autocast = linear_dtype(hidden), hidden.device.type, False
        self._autocast: Any = nullcontext()
        if torch.amp.is_autocast_available(kind):
            autocast = torch.is_autocast_enabled(kind)
            self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=autocast)
        self.weight: Tensor | Rows | None
        self.bias: Tensor | None
        self.weight, self.bias = linear or (None, None)
        if isinstance(self.weight, Tensor):
            same = autocast or self.weight.dtype == hidden.dtype
            # A weight elsewhere (offloaded), or in a dtype that F.linear refuses, is left to the module.
            if self.weight.device != hidden.device or not same:
                self.weight = self.bias = None
        self._versions = self._parameter_versions()

    def __call__(self, hidden: Tensor) -> Tensor:
        with self._autocast:
            return self._forward(hidden)

    def logits(self) -> Tensor:
        if self._parameter_versions() != self._versions:
            raise RuntimeError(
                f"{type(self._head).__name__}: found the output head changed since the forward whose logits are read, "
                "expected it as it was. With the chunked loss, read outputs.logits before the optimizer's step."
            )
        return self(self.hidden)

    def rows(self) -> int | None:
        """V of a linear head."""
        return self.weight.shape[0] if isinstance(self.weight, Tensor) else getattr(self.weight, "rows", None)

    def _parameter_versions(self) -> list[int]:
        return [p._version for p in self._head.parameters()]


class DeferredLogits:
    """Logits (..., V) that are computed when someone looks at them.

    Multiplication with and division by a number, ``tanh``, casts and moves are remembered; shape, dtype
    and device are known. Every other operation, method or torch function runs on the true logits, which
    are computed once, with gradients, as long as the head's parameters are those of the forward.
    """

    def __init__(self, call: HeadCall, steps: tuple[LogitStep, ...] = (), place: torch.device | None = None) -> None:
        self._call, self._steps, self._place = call, steps, place
        self._computed: Tensor | None = None

    def true(self) -> Tensor:
        """The logits as a tensor. Raises RuntimeError if the head has changed since the forward."""
        if self._computed is None:
            # A tensor would have had its graph, wherever it is read.
            with torch.enable_grad():
                logits = self._stepped(self._call.logits())
                self._computed = logits if self._place is None else logits.to(self._place)
        return self._computed

    def fits(self, vocabulary: int) -> bool:
        """Whether V is what the loss expects, and nobody holds (and may have written into) the true logits."""
        return self._computed is None and self._call.rows() in (None, vocabulary)

    def parts(self) -> tuple[Tensor, Head, Tensor | None, tuple[LogitStep, ...]]:
        """hidden (tokens, H), head, bias and steps, for :func:`qsvft.lean.cross_entropy.chunked_cross_entropy`."""
        call = self._call
        head: Head = call if call.weight is None else call.weight
        return call.hidden.reshape(-1, call.hidden.shape[-1]), head, call.bias, self._steps

    def _stepped(self, logits: Tensor) -> Tensor:
        for step in self._steps:
            logits = step(logits)
        return logits

    def _then(self, kind: Any, value: Any = None) -> Any:
        step = LogitStep(kind, value)
        if self._computed is not None:
            return step(self._computed)
        return DeferredLogits(self._call, (*self._steps, step), self._place)

    @functools.cached_property
    def _like(self) -> Tensor:
        """The logits without their values: one element for all of them."""
        hidden, width = self._call.hidden, self._call.rows()
        with torch.no_grad():
            if width is None:
                one = self._call(hidden.reshape(-1, hidden.shape[-1])[:1])
            else:
                one = hidden.new_empty(0, width, dtype=self._call.dtype)
            one = self._stepped(one)
        element = torch.empty((), dtype=one.dtype, device=self._place or one.device)
        return element.expand(*hidden.shape[:-1], one.shape[-1])

    def contiguous(self) -> DeferredLogits:
        return self

    def float(self) -> Any:
        return self._then("cast", torch.float32)

    def tanh(self) -> Any:
        return self._then("tanh")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        target = args[0] if len(args) == 1 and kwargs.keys() <= {"non_blocking"} else kwargs.get("dtype")
        if isinstance(target, torch.dtype) and target.is_floating_point and len(args) + len(kwargs) == 1:
            return self._then("cast", target)
        if self._computed is None and isinstance(target, torch.device | str | int):
            return DeferredLogits(self._call, self._steps, torch.empty(0, dtype=torch.float32, device=target).device)
        return self.true().to(*args, **kwargs)

    def __mul__(self, other: Any) -> Any:
        return self._then("multiply", other) if isinstance(other, int | float) else self.true() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._then("divide", other) if isinstance(other, int | float) else self.true() / other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):  # what copy and others ask for in vain
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._like if name in _KNOWN else self.true(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return func(*_all_true(tuple(args)), **_all_true(kwargs or {}))

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def true_logits(value: Any) -> Any:
    """The logits as a tensor where they are deferred; anything else as it is."""
    return value.true() if isinstance(value, DeferredLogits) else value


def _all_true(value: Any) -> Any:
    """As :func:`true_logits`, in tuples, lists and dicts too."""
    if type(value) in (tuple, list):
        return type(value)(_all_true(each) for each in value)
    if type(value) is dict:
        return {key: _all_true(each) for key, each in value.items()}
    return true_logits(value)


def _of_the_true_logits(name: str) -> Callable[..., Any]:
    def method(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self.true(), name)(*_all_true(args))

    return method


# Python looks operators up on the class, past __getattr__.
for _name in [
    *("add", "radd", "sub", "rsub", "rtruediv", "floordiv", "mod", "pow", "rpow", "matmul", "rmatmul", "neg", "abs"),
    *("eq", "ne", "lt", "le", "gt", "ge", "getitem", "setitem", "len", "iter", "contains", "bool", "float", "array"),
]:
    setattr(DeferredLogits, f"__{_name}__", _of_the_true_logits(f"__{_name}__"))
