"""Where checkpoints are kept once they are prepared, so that each is prepared once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ...storage.whole_files import check_folder_writable
from ..prepared.record import is_finished
from .job import Job
from .streaming import run_job

CACHE = "QSVFT_CACHE"
"""The environment variable that says where prepared checkpoints are kept; ~/.cache/qsvft without it."""

_LOCKS = ".locks"

logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """Where prepared checkpoints are kept."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "qsvft")


def prepared_in_cache(
    job: Job, cache_dir: str | os.PathLike[str] | None, workers: int, device: torch.device, progress: bool
) -> Path:
    """The prepared directory of a job, made if it is not there yet.

    Of several processes that ask for it at once, as ``accelerate launch`` starts them, one prepares and the others
    wait. If it dies the next one goes on where it stopped.

    Args:
        job: what is to be prepared.
        cache_dir: where it is kept; None for :func:`default_cache`.
        workers, device, progress: for the preparation.

    Raises:
        OSError: the cache cannot be written.
    """
    identity = json.dumps([_what(job), job.checkpoint.fingerprint()], sort_keys=True, default=str)
    name = re.sub(r"[^\w.-]+", "-", Path(job.checkpoint.name).name)[:64]
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = (default_cache() if cache_dir is None else Path(cache_dir)) / f"{name}-{digest}"
    if not is_finished(folder):
        with _turn(folder):
            if not is_finished(folder):
                run_job(job, job.target(folder), workers, device, progress)
    return folder


def _what(job: Job) -> list[Any]:
    """What is prepared. Which layers are decomposed is said by their names: a trained adapter's config has these in
    place of "all-linear", and is for the same directory."""
    record = job.options.record()
    if decomposed := [unit.name for unit in job.units if unit.stored is not None]:
        record["adapter"]["target_modules"] = sorted(decomposed)
    return [record, [asdict(unit) for unit in job.units]]


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one process at a time prepare a directory of the cache; its lock goes with it, however it ends."""
    locks = folder.parent / _LOCKS
    check_folder_writable(folder.parent)
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is preparing %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
