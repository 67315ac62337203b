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

from cases import BUDGETS, LIMITS, PATIENCE, RESERVE
from results import ROOT, card_name, safe_name

STUDY = "study"
STAGES = tuple(stage for stage in BUDGETS if stage != STUDY)
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
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{', '.join(STAGES)}; {STUDY} or summary, alone")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help="how long the whole command may take, its start included")
    parser.add_argument("--rehearse", action="store_true", help="every stage's code on the CPU at toy size")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--commit", help="of this checkout, where there is no git to ask")
    parser.add_argument("--weights", type=Path, action="append", default=[], help="folder of the study's model")
    parser.add_argument("--data", type=Path, help="folder of the study's train.jsonl and dev.jsonl")
    parser.add_argument("--steps", type=int, default=100, help="of a run of the study")
    parser.add_argument("--rates", type=int, default=3, help="learning rates of each variant of the study")
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
    known = (*STAGES, STUDY, "summary")
    unknown = [stage for stage in options.stages if stage not in known]
    if unknown:
        return f"unknown stage {unknown[0]!r}; expected {', '.join(known)}"
    if len(options.stages) > 1 and {STUDY, "summary"} & set(options.stages):
        return "study and summary stand alone; expected no other stage beside them"
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} not installed here; install it or give its wheel with --wheels DIR"
    if options.stages != [STUDY]:
        return None
    if not options.weights or options.data is None:
        return "study needs --weights DIR (once for each folder) and --data DIR"
    needed = [*options.weights, options.data / "train.jsonl", options.data / "dev.jsonl"]
    absent = next((path for path in needed if not path.exists()), None)
    return None if absent is None else f"there is no {str(absent)!r}"


def _run(options: argparse.Namespace, folder: Path) -> int:
    stages = options.stages or list(STAGES)
    seconds = LIMITS["study" if stages == [STUDY] else "card"] * (PATIENCE if options.rehearse else 1)
    seconds = options.seconds or seconds
    ends = options.started + seconds - RESERVE
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("stages.py")), *stages]
    command += ["--output", str(folder), "--started", str(options.started), "--ends", str(ends - RESERVE)]
    command += ["--steps", str(options.steps), "--rates", str(options.rates)]
    command += ["--rehearse"] if options.rehearse else []
    command += ["--commit", options.commit] if options.commit else []
    command += ["--data", str(options.data)] if options.data else []
    for weights in options.weights:
        command += ["--weights", str(weights)]
    return watch(command, ends)


def _default_folder(rehearsal: bool) -> Path:
    if rehearsal:
        return Path(tempfile.mkdtemp(prefix="qsvft-rehearsal-"))
    return ROOT / "benchmarks" / "results" / "gpu" / safe_name(card_name())


if __name__ == "__main__":
    sys.exit(main())
