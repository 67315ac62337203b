"""The watch over a command: it starts stages.py, starts it again where it died, and ends it when time is up.

Imports no torch, so that it runs at once and nothing of a card's can stop it. Called by card.sh.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cases import BUDGETS, LIMIT, PATIENCE, RESERVE
from results import ROOT, card_name, safe_name

STAGES = tuple(BUDGETS)
NEEDED = (
    *("torch", "numpy", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors", "huggingface_hub"),
    *("filelock", "typer", "rich", "psutil", "pytest"),
)
CANNOT_RUN, UNFINISHED = 2, 3
ENDED = (0, 2, 3, 4)
"""Exit statuses of stages.py that it chose itself; with any other it died."""
AGAIN_AT_MOST, AGAIN_LEAST_S = 3, 30.0


def watch(command: Sequence[str], ends: float) -> int:
    """Run a command to its end or until time is up; again, a few times, where it dies.

    Args:
        command: what to run; it makes a process group, which is killed when time is up.
        ends: seconds since 1970.

    Returns:
        Its exit status; 3 where time was up, 1 where it died too often.
    """
    for attempt in range(AGAIN_AT_MOST + 1):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp)
        try:
            status = process.wait(max(ends - time.time(), 0))
        except subprocess.TimeoutExpired:
            status = None
        finally:  # with its children, whatever became of it
            _kill(process)
        if status is None:
            print("card.sh: time is up; the process was ended", flush=True)
            return UNFINISHED
        if status in ENDED:
            return status
        print(f"card.sh: the process ended with status {status}", flush=True)
        if attempt == AGAIN_AT_MOST or ends - time.time() < AGAIN_LEAST_S:
            break
    return 1


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="card.sh", description="see README.md beside card.sh")
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{', '.join(STAGES)}; or summary, alone")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help="how long the whole command may take, its start included")
    parser.add_argument("--rehearse", action="store_true", help="every stage's code on the CPU at toy size")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--commit", help="of this checkout, where there is no git to ask")
    options = parser.parse_args(arguments)
    trouble = _trouble(options)
    if trouble:
        print(f"card.sh: {trouble}", file=sys.stderr)
        return CANNOT_RUN
    folder = options.output or _default_folder(options.rehearse)
    status = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNFINISHED))  # so that what was started ends too
    if options.stages != ["summary"]:
        status = _run(options, folder)
    from summary import write_summary

    write_summary(folder)
    print(f"results: {folder}", flush=True)
    return status


def _trouble(options: argparse.Namespace) -> str | None:
    known = (*STAGES, "summary")
    unknown = [stage for stage in options.stages if stage not in known]
    if unknown:
        return f"unknown stage {unknown[0]!r}; expected {', '.join(known)}"
    if len(options.stages) > 1 and "summary" in options.stages:
        return "summary stands alone; expected no stage beside it"
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} not installed here; install it or give its wheel with --wheels DIR"
    return None


def _run(options: argparse.Namespace, folder: Path) -> int:
    stages = options.stages or list(STAGES)
    seconds = options.seconds or LIMIT * (PATIENCE if options.rehearse else 1)
    ends = options.started + seconds - RESERVE
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("stages.py")), *stages]
    command += ["--output", str(folder), "--started", str(options.started), "--ends", str(ends - RESERVE)]
    command += ["--rehearse"] if options.rehearse else []
    command += ["--commit", options.commit] if options.commit else []
    return watch(command, ends)


def _default_folder(rehearsal: bool) -> Path:
    if rehearsal:
        return Path(tempfile.mkdtemp(prefix="qsvft-rehearsal-"))
    return ROOT / "benchmarks" / "results" / "gpu" / safe_name(card_name())


if __name__ == "__main__":
    sys.exit(main())
