"""Several files of a directory that are replaced as one state, whenever a process is killed.

They are written into ``.qsvft-saving``, which is renamed to ``.qsvft-saved`` when it is whole and on the disk: from
then on the new state counts. Its files then take their places one by one; where that was cut off, the next who reads or
saves there goes on with it. What was never whole is removed by the next save.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":  # there two who save into one directory at the same time are not kept apart
    import fcntl

SAVING, SAVED = ".qsvft-saving", ".qsvft-saved"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty directory whose files take the places of those of ``folder`` together; nothing happens if this fails.

    Of two threads or processes that do this at once one waits for the other.

    Args:
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _publish(folder)
        staging = folder / SAVING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            usual_permissions(staging)
            for path in _files(staging):
                _sync(path)
            os.replace(staging, folder / SAVED)
            _sync(folder)
            _publish(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def finish_saving(folder: Path) -> None:
    """Put the files of a save that was cut off in their places, where one was; else nothing is touched."""
    if (folder / SAVED).is_dir():
        with _locked(folder):
            _publish(folder)


def usual_permissions(folder: Path) -> None:
    """Give the files in a directory the permissions of a new one: safetensors' writer makes them for the owner."""
    trial = folder / ".qsvft-trial"
    trial.touch()
    mode = trial.stat().st_mode & 0o777
    trial.unlink()
    for path in _files(folder):
        with suppress(OSError):
            path.chmod(mode)


def _publish(folder: Path) -> None:
    saved = folder / SAVED
    if not saved.is_dir():
        return
    for path in _files(saved):
        final = folder / path.relative_to(saved)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, final)
    _sync(folder)
    shutil.rmtree(saved)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    with suppress(OSError):  # directories cannot be opened everywhere
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
