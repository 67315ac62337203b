"""One process at a time works in a directory; its lock goes with it, however it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

logger = logging.getLogger(__name__)


@contextmanager
def only_process(lock: Path, doing: str, other: str) -> Iterator[None]:
    """Keep others out of a directory. Where its file system has no locks a warning says so, and they are not kept out.

    Args:
        lock: a file in it, which is there meanwhile.
        doing: what is done there, as "preparing".
        other: what gives another directory, as "target".

    Raises:
        ValueError: another process holds the lock.
    """
    held: BaseFileLock | None = None
    try:
        held = FileLock(lock).acquire(timeout=0).lock
    except Timeout:
        raise ValueError(
            f"{lock.parent}: another process is {doing} into this directory; expected none. Wait for it, or give "
            f"another {other}."
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s: nothing keeps other processes out, as it cannot be locked (%s)", lock.parent, error)
    try:
        yield
    finally:
        # While it is held: afterwards the file may be another process's lock.
        if held is not None:
            with suppress(OSError):
                lock.unlink()
            held.release()
