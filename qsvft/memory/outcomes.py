"""What an operation gives on meta tensors, remembered: layers repeat, and torch finds most shapes in slow Python.

Without values the outcome depends on the shapes, strides and dtypes of the tensors and on the numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_NUMBERS = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Outcomes:
    """Runs operations; where one gave a new meta tensor, or its first argument as it was, that is done again."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype] | None] = {}

    def of(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` gives."""
        key = (func, described(args), described(tuple(kwargs.items())))
        if None in key:
            return func(*args, **kwargs)
        if key in self._known:
            found = self._known[key]
            return args[0] if found is None else torch.empty_strided(*found[:2], dtype=found[2], device="meta")
        before = [tensor.untyped_storage() for tensor in _tensors((args, tuple(kwargs.values())))]
        out = func(*args, **kwargs)
        if _fills_a_storage(out) and all(out.untyped_storage() is not storage for storage in before):
            self._known[key] = out.shape, out.stride(), out.dtype
        elif args and out is args[0] and described(out) == key[1][0] and out.untyped_storage() is before[0]:
            self._known[key] = None
        return out


def described(value: Any) -> Any:
    """All that an outcome can depend on; None where that may be a tensor's values, or is unknown."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, list | tuple):
        parts = tuple(map(described, value))
        return None if None in parts else parts
    return (type(value), value) if isinstance(value, _NUMBERS) else None  # 1, 1.0 and True are equal


def _fills_a_storage(out: Any) -> bool:
    """Whether it is an ordinary tensor that leaves nothing of its storage over."""
    if type(out) is not Tensor or not out.is_meta or out.layout is not torch.strided:
        return False
    plain = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    return out.untyped_storage().nbytes() == plain.untyped_storage().nbytes()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
