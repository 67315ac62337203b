"""Where the numbers go: JSON Lines that a cut-off cannot hurt, and what was running when they were made.

A file holds, for each run that added to it, one line with the machine, the versions and the commit, and
one line a finished case. The last line of a case counts. A case is done if it has a line of the same commit
and the same fingerprint (sources and versions) that is no failure.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qsvft", "torch", "transformers", "accelerate", "peft", "bitsandbytes")
FAILED = "failed"


@dataclass(frozen=True)
class Run:
    """One call of the suite.

    Attributes:
        run: when it started, UTC; the name of the run in every row.
        commit: of the checkout, or "unknown" where there is no git.
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
    def begin(cls, machine: dict[str, Any], rehearsal: bool) -> Run:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        found = versions()
        return cls(now, commit(), fingerprint(found), rehearsal, machine, found)


class Rows:
    """The rows of one stage, appended as they come.

    Args:
        path: the JSON Lines file; its folder is made.
        run: the run that adds rows.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self.path, self.run = path, run
        self._begun = False
        self._latest = {row["case"]: row for row in read(path) if self._current(row)}

    def _current(self, row: dict[str, Any]) -> bool:
        same = row.get("commit") == self.run.commit and row.get("fingerprint") == self.run.fingerprint
        return "case" in row and same and row.get("rehearsal") == self.run.rehearsal

    def done(self, case: str) -> bool:
        """Whether a case has its row already; one that failed is tried again."""
        return case in self._latest and self._latest[case]["status"] != FAILED

    def find(self, case: str) -> dict[str, Any] | None:
        """The latest row of a case in the present state of the code."""
        return self._latest.get(case)

    def latest(self) -> list[dict[str, Any]]:
        """The latest row of every case in the present state of the code."""
        return list(self._latest.values())

    def append(self, case: str, status: str, **values: Any) -> dict[str, Any]:
        """Write one row, on the disk before this returns."""
        if not self._begun:
            self._write({"kind": "run", **asdict(self.run)})
            self._begun = True
        run = self.run
        row = {"case": case, "status": status, **values, "run": run.run, "commit": run.commit}
        row |= {"fingerprint": run.fingerprint, "rehearsal": run.rehearsal}
        self._write(row)
        self._latest[case] = row
        return row

    def _write(self, row: dict[str, Any]) -> None:
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


def read(path: Path) -> Iterator[dict[str, Any]]:
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


# --- what was running -----------------------------------------------------------------------------


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
    for folder in ("qsvft", "benchmarks/gpu", "tests"):
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


def safe_name(card: str) -> str:
    """A card's name as a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", card.lower()).strip("-.") or "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
