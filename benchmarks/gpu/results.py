"""Where the numbers go: JSON Lines that a cut-off cannot hurt, and what was running when they were made.

One file holds, for each run that added to it, a line with the machine, the versions and the commit, and a line a
finished case. The last line of a case counts. A case is done if it has a line of the same commit and the same
fingerprint (sources and versions) that is no failure. The case at hand stands in a file of its own meanwhile: where a
process dies with it, the next one says so in its line and goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qsvft", "torch", "transformers", "accelerate", "peft", "bitsandbytes")
RAN, FAILED, LOST = "ran", "failed", "lost"
FILE, AT_HAND = "results.jsonl", "at-hand.json"

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One call of the command, which may take several processes.

    Attributes:
        run: when it started, UTC; the name of the run in every row.
        commit: of the checkout, or "unknown" where there is no git and nobody said.
        fingerprint: of the library's and the suite's sources and the packages' versions, so that changes
            which are not committed count as another state.
    """

    run: str
    commit: str
    fingerprint: str
    rehearsal: bool
    machine: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def begin(cls, machine: dict[str, Any], rehearsal: bool, started: float, known_commit: str | None = None) -> Run:
        """A run that began at ``started``, seconds since 1970."""
        began = datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="milliseconds")
        found = versions()
        return cls(began, known_commit or commit(), fingerprint(found), rehearsal, machine, found)


class Rows:
    """The rows of a run, appended as they come.

    Args:
        folder: where the file of rows is, or is made.
        run: the run that adds rows.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.path, self.run = folder / FILE, run
        self._at_hand = folder / AT_HAND
        known = list(read(self.path))
        self._begun = any(row.get("kind") == "run" and row.get("run") == run.run for row in known)
        self._latest = {row["case"]: row for row in known if self._current(row)}

    def _current(self, row: Row) -> bool:
        same = row.get("commit") == self.run.commit and row.get("fingerprint") == self.run.fingerprint
        return "case" in row and same and row.get("rehearsal") == self.run.rehearsal

    def done(self, case: str) -> bool:
        """Whether a case has its row already. One that failed in an earlier run is tried again."""
        row = self._latest.get(case)
        return row is not None and (row["status"] not in (FAILED, LOST) or row["run"] == self.run.run)

    def find(self, case: str) -> Row | None:
        """The latest row of a case in the present state of the code."""
        return self._latest.get(case)

    def of(self, stage: str) -> list[Row]:
        """The latest row of every case of a stage in the present state of the code."""
        return [row for row in self._latest.values() if row["stage"] == stage]

    def latest(self) -> list[Row]:
        """The latest row of every case in the present state of the code."""
        return list(self._latest.values())

    def append(self, stage: str, case: str, status: str, **values: Any) -> Row:
        """Write one row, on the disk before this returns."""
        if not self._begun:
            self._write({"kind": "run", **asdict(self.run)})
            self._begun = True
        run = self.run
        row = {"stage": stage, "case": case, "status": status, **values, "run": run.run, "commit": run.commit}
        row |= {"fingerprint": run.fingerprint, "rehearsal": run.rehearsal}
        self._write(row)
        self._latest[case] = row
        return row

    @contextmanager
    def at_hand(self, stage: str, case: str) -> Iterator[None]:
        """Say which case is being measured, for the process after this one if it dies."""
        self._at_hand.parent.mkdir(parents=True, exist_ok=True)
        self._at_hand.write_text(json.dumps({"stage": stage, "case": case, "run": self.run.run}))
        try:
            yield
        finally:
            self._at_hand.unlink(missing_ok=True)

    def bury(self) -> Row | None:
        """The row of the case that the process before this one died with, if it did."""
        try:
            left = json.loads(self._at_hand.read_text())
        except (OSError, json.JSONDecodeError):
            return None
        self._at_hand.unlink(missing_ok=True)
        if left.get("run") != self.run.run:
            return None
        return self.append(left["stage"], left["case"], LOST, reason="the process died with it")

    def _write(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            # A line that a cut-off left without its end must not swallow the next one.
            if file.tell() and _last_byte(self.path) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def read(path: Path) -> Iterator[Row]:
    """The whole lines of a file; what a cut-off left half-written is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row


def versions() -> dict[str, str]:
    """Versions that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def commit() -> str:
    """The checkout's commit, or "unknown"."""
    return _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown"


def fingerprint(found: dict[str, str]) -> str:
    """Sixteen hex digits over the sources of the library and the suite, and the versions."""
    sha = hashlib.sha256(json.dumps(found, sort_keys=True).encode())
    for folder in ("qsvft", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            sha.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def machine(device: str) -> dict[str, Any]:
    """The card and its driver, or the processor in a rehearsal. Nothing that names the computer."""
    import torch

    about: dict[str, Any] = {"system": f"{platform.system()} {platform.release()}", "cpus": os.cpu_count()}
    if device != "cuda":
        return {"card": "cpu", "processor": platform.machine(), **about}
    card = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "card": card.name,
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "compute_capability": f"{card.major}.{card.minor}",
        "driver": driver[0].strip() if driver else "unknown",
        "cuda": torch.version.cuda,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default")),
        **about,
    }


def card_name() -> str:
    """The first card's name as its driver says it, "unknown" where there is none."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return names[0].strip() if names else "unknown"


def safe_name(card: str) -> str:
    """A card's name as a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", card.lower()).strip("-.") or "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
