"""Vᵀ x once for several layers that read the same x."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LastInput:
    """The coefficients h = Vᵀ x of the last x, for the other layers that read the same x.

    Nothing here keeps x alive, and h is dropped with x.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._readers: set[Any] = set()
        self._h: Tensor | None = None

    def coefficients(
        self, source: Tensor, how: tuple[Any, ...], reader: object, compute: Callable[[], Tensor]
    ) -> Tensor:
        """h, taken over if another reader computed it from the same tensor in the same way.

        Args:
            source: x as the layer received it.
            how: what h depends on beside x (rank, dtype).
            reader: a reader who asks again begins anew: its first h belongs to a graph that may be gone.
            compute: makes h.
        """
        version = 0 if source.is_inference() else source._version
        key = (*how, version, torch.is_grad_enabled())
        known = self._source is not None and self._source() is source and self._key == key
        if not known or self._h is None or reader in self._readers:
            self.forget()
            self._h, self._key = compute(), key
            me = weakref.ref(self)
            self._source = weakref.ref(source, lambda gone: _forget(me, gone))
        self._readers.add(reader)
        return self._h

    def forget(self) -> None:
        """Drop h."""
        self._source, self._h = None, None
        self._readers.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> LastInput:
        return LastInput()

    def __reduce__(self) -> tuple[type[LastInput], tuple[()]]:
        return LastInput, ()


def _forget(cache: weakref.ref[LastInput], gone: weakref.ref[Tensor]) -> None:
    me = cache()
    if me is not None and me._source is gone:
        me.forget()
