"""Stage "clock": benchmarks/speed in a process of its own: single layers, the floor of their parts, a compiled model.

It writes its own results, case by case, into ``clock`` beside the others.
"""

from __future__ import annotations

import sys

import beside
from results import FAILED, RAN, ROOT
from suite import Suite, say

STAGE = "clock"
LOG = "clock.log"
CARD = (
    *("floor", "layers", "compiled", "--device", "cuda", "--shapes", "llama-3-8b", "--models", "llama-3-8b"),
    *("--tokens", "2048", "--rounds", "5", "--seconds", "2"),
    *("--methods", "qsvft", "qsvft:rank=256", "qsvft:sides=one,pattern=banded", "svft", "svft-authors"),
)
TOY = ("layers", "--short", "--shapes", "tiny", "--tokens", "32", "--seconds", "0.1", "--methods", "qsvft")


def run(suite: Suite) -> None:
    """Its rows are those of benchmarks/speed; the suite has one that says how it ended."""
    case = f"{STAGE} | benchmarks/speed"
    if suite.rows.done(case):
        return
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "speed" / "run.py")]
    command += [*(TOY if suite.run.rehearsal else CARD), "--output", str(suite.folder / "clock")]
    status = beside.run(command, suite.folder / LOG)
    reason = {} if status == 0 else {"reason": f"it ended with {status}, see {LOG}"}
    suite.rows.append(STAGE, case, FAILED if status else RAN, **reason)
    say(f"{STAGE}: {reason.get('reason', 'done')}, see {LOG}")
