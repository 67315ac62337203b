"""One process at a time works in a directory; its lock goes with it, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def only_process(lock: Path, doing: str, other: str) -> Iterator[None]:
    """Keep others out of a directory.

    Args:
        lock: a file in it, which is there meanwhile.
        doing: what is done there, as "preparing".
        other: what gives another directory, as "target".

    Raises:
        ValueError: another process holds the lock.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{lock.parent}: another process is {doing} into this directory; expected none. Wait for it, or give "
            f"another {other}."
        ) from None
    try:
        yield
    finally:
        # While it is held: afterwards the file may be another process's lock.
        with suppress(OSError):
            lock.unlink()
        held.release()
