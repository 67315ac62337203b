"""Train every method of a study on every task, at the rates and seeds that are missing: one line of JSON a run.

    python benchmarks/quality/run.py --model DIRECTORY --data DIRECTORY --runs DIRECTORY --study NAME [--minutes 25]

DIRECTORY of the model is a causal language model's as ``save_pretrained`` writes it; that of the data has GSM8K's
``gsm8k/train.jsonl`` and ``dev.jsonl``, and ``commonsense/NAME.train.jsonl`` and ``NAME.dev.jsonl``. Nothing that has
its line is done again, so that the command goes on where it was cut off; it may run several times at once, on a core
each (``--threads 1``), and ``report.py`` makes tables and pictures of what there is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Freed memory is kept: glibc would give every large activation back, to be cleared anew for the next.
_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="where runs.jsonl is, or is made")
    parser.add_argument("--study", nargs="+", required=True, help="names in studies.py")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--threads", type=int, help="of each matrix product")
    options = parser.parse_args(arguments)
    if arguments is None:
        _keep_freed_memory()
    if failures := work(options):
        sys.exit(f"error: {failures} methods failed; their tracebacks stand above")


def _keep_freed_memory() -> None:
    """Start again with what glibc reads when a process starts."""
    if not set(_KEPT) <= set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**_KEPT, **os.environ})


def work(options: argparse.Namespace) -> int:
    """Do runs until there are none, or the time is up; how many failed, whose methods were not run any further."""
    import torch
    from runs import Runs

    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs, until = Runs(options.runs, device), time.monotonic() + 60 * options.minutes
    tasks: dict[Any, Any] = {}
    failed: list[Any] = []
    while time.monotonic() < until:
        for job, identity, claim in wanted(options.study, runs):
            if job in failed:
                continue
            with claim as mine:
                if mine:
                    print("{task}: {method}, rate {rate:g}, seed {seed}".format_map(identity), flush=True)
                    try:
                        runs.add(identity, _found(job, identity, options, device, runs, tasks))
                    except Exception:  # another method's own code, or too little memory: the others go on
                        traceback.print_exc()
                        failed.append(job)
                    break
        else:
            break
    return len(failed)


def wanted(studies: Sequence[str], runs: Any) -> Iterator[tuple[Any, dict[str, Any], Any]]:
    """Every job with the run that it wants next, and the claim of that run; first the models before training."""
    from studies import jobs

    rows = runs.read()
    for job in jobs(studies):
        if (identity := job.untrained()) and not any(runs.same(row, identity) for row in rows):
            yield job, identity, runs.claimed(identity)
    for job in jobs(studies):
        following = job.next_run(rows)
        if following is not None:
            identity = job.identity(*following)
            yield job, identity, runs.claimed(identity)


def _found(job: Any, identity: Any, options: Any, device: str, runs: Any, tasks: dict[Any, Any]) -> dict[str, Any]:
    from studies import load_task
    from training import run, untrained

    place = (job.task, job.held_out, job.exact_match)
    if place not in tasks:
        tasks[place] = load_task(job, options.model, options.data, options.runs, device)
    if not identity["steps"]:
        return untrained(tasks[place], job.held)
    seen = job.rows(runs.read(), identity["seed"])
    others = [row["losses"] for row in seen if None not in row["losses"]]
    return run(
        tasks[place], job.method, identity["rate"], identity["seed"], job.steps, job.batch_size, job.held, others
    )


if __name__ == "__main__":
    main()
