"""Files that are written whole or not at all: a reader, or a crash, finds the old content or the new, never a part."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SPARE_BYTES = 64 * 2**20


@contextmanager
def whole_file(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when its bytes are on the disk, and is removed if anything fails.

    Args:
        path: the file; a symbolic link to it stays one if it is resolved before.
        staging: a directory for the temporary file, on the same file system, made if it is not there; None for the
            file's own, under a hidden name.
    """
    temporary = path.parent / f".{path.name[:200]}.{os.getpid()}"
    if staging is not None:
        staging.mkdir(exist_ok=True)
        temporary = staging / f"{path.name}-{os.getpid()}"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file; see :func:`check_file_writable` for what it refuses."""
    check_file_writable(path)
    with whole_file(Path(os.path.realpath(path))) as temporary:
        temporary.write_bytes(content)


def check_file_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work starts whether :func:`write_whole` can write a file.

    Raises:
        ValueError: one line with the path and what stands in the way.
    """
    final = os.path.realpath(path)
    folder = os.path.dirname(final)
    if os.path.exists(final) and not os.path.isfile(final):
        raise ValueError(f"cannot write {str(path)!r}: it exists and is no regular file")
    if not os.path.isdir(folder):
        raise ValueError(f"cannot write {str(path)!r}: there is no directory {folder!r}")
    if not os.access(folder, os.W_OK | os.X_OK) or (os.path.exists(final) and not os.access(final, os.W_OK)):
        raise ValueError(f"cannot write {str(path)!r}: permission denied")


def check_folder_writable(folder: Path) -> None:
    """Make a directory, and find out whether files can be written there.

    Raises:
        ValueError: something that is no directory stands there.
        OSError: naming it and what stands in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: exists and is no directory; expected a directory to prepare into. Give another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".qsvft-trial"
        trial.touch()
        trial.unlink()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise type(error)(
            error.errno,
            f"{folder}: cannot be written to ({reason}); expected a writable directory. Give another target",
        ) from error


def check_room(folder: Path, nbytes: int) -> None:
    """Refuse to begin what does not fit on the disk.

    Raises:
        OSError: fewer bytes are free than are still to be written.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{folder}: {_gib(nbytes)} are still to be written, {_gib(free)} are free on its file system. Free some "
            "space, or give a target elsewhere",
        )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def _sync_directory(folder: Path) -> None:
    """Put the renaming on the disk as well, where directories can be opened for that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
