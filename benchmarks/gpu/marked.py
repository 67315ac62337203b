"""Stage "tests": the tests that need CUDA, in a process of their own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import beside
from recorder import STAGE
from results import FAILED, ROOT, Rows
from suite import Suite, say

LOG = "tests.log"


def run(suite: Suite) -> None:
    """Run pytest; it writes a row for each test. In a rehearsal they skip themselves."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("recorder.py"))]
    command += [str(suite.folder), json.dumps(asdict(suite.run)), "-m", "cuda", str(ROOT / "tests" / "cuda")]
    try:
        status = beside.run(command, suite.folder / LOG)
    finally:
        suite.rows = Rows(suite.folder, suite.run)  # with what the other process wrote
        suite.predictions.rows = suite.rows
    say(f"{STAGE}: {_summary(suite)}, see {LOG}")
    if status not in (0, 1, 5):  # passed, some failed, none was left to run
        suite.rows.append(STAGE, f"{STAGE} | pytest", FAILED, reason=f"pytest ended with {status}, see {LOG}")


def _summary(suite: Suite) -> str:
    counts: dict[str, int] = {}
    for row in suite.rows.of(STAGE):
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "no test ran"
