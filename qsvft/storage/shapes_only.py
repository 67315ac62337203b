"""Building adapters on the meta device, for counting bytes: shapes without values.

Outside this context a meta-device weight is refused, since there is nothing to decompose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ACTIVE: ContextVar[bool] = ContextVar("qsvft_shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let adapters be attached to weights without values; they get factors and M without values."""
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def shapes_only_active() -> bool:
    """Whether the code runs inside :func:`shapes_only`."""
    return _ACTIVE.get()
