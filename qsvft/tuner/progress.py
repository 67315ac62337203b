"""Whether the progress bar over decompositions is shown: PEFT's own doors have no argument for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHOWN: ContextVar[bool] = ContextVar("qsvft_show_progress", default=True)


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Show or hide the progress bar over decompositions."""
    token = _SHOWN.set(show)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def progress_shown() -> bool:
    """Whether it is shown."""
    return _SHOWN.get()
