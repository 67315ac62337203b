"""The file of runs: a line each, added whole; several processes share it, and none does what another is doing."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import results

IDENTITY = ("task", "method", "options", "rate", "seed", "steps", "batch_size", "held", "held_out")
"""What makes two runs the same one."""

Row = dict[str, Any]


class Runs:
    """The runs of a folder.

    Args:
        folder: with ``runs.jsonl``, which is made where there is none; and, while runs go on, their locks.
        device: "cpu" or "cuda".
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "runs.jsonl"
        self._about = {"machine": results.machine(device), "versions": results.versions(), "commit": results.commit()}

    def read(self) -> list[Row]:
        """All that are done, in their order."""
        return list(results.read(self.path))

    def find(self, identity: Row) -> Row | None:
        """The run of an identity, if it is done."""
        return next((row for row in self.read() if self.same(row, identity)), None)

    @staticmethod
    def same(row: Row, identity: Row) -> bool:
        """Whether a line is of the run of an identity."""
        return key(row) == key(identity)

    @contextmanager
    def claimed(self, identity: Row) -> Iterator[bool]:
        """Whether this process may do a run: nobody else does it while this lasts, and it is not done."""
        lock = self.folder / f".{key(identity)}.lock"
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield self.find(identity) is None
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def add(self, identity: Row, found: Row) -> None:
        """Write a run's line; it is on the disk before this returns."""
        line = json.dumps({**identity, **found, **self._about}, allow_nan=False).encode() + b"\n"
        with open(self.path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def key(row: Row) -> str:
    """Sixteen hex digits over what makes a run the one it is."""
    text = json.dumps([row[name] for name in IDENTITY], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
