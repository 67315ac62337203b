"""One process of the command: the stages in their order, each for its seconds. Started by card.py.

Exit status: 0 every case has a row that is no failure, 2 it cannot run here, 3 time was up, 4 something failed,
75 the CUDA context was lost. Any other means that the process died.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from cases import BUDGETS, FULL, PATIENCE, REHEARSAL, searches_of, steps_of
from predictions import Predictions
from results import FAILED, LOST, RAN, Rows, Run, machine
from steps import Card, Rehearsal
from suite import ContextLost, OutOfTime, Suite, say, side_jobs

OK, CANNOT_RUN, UNFINISHED, FAILURES, AGAIN = 0, 2, 3, 4, 75
LEAST_S = 5.0
"""A stage is not begun with less than this left."""
WAIT_S = 15.0
"""How long the end waits for predictions that are still being counted; they can be counted anywhere later."""

StageRun = Callable[[Suite], None]


def stage_table() -> dict[str, StageRun]:
    """What runs, in the order of the budgets; a module is read when its stage begins."""

    def of(name: str) -> StageRun:
        def run(suite: Suite) -> None:
            __import__(name).run(suite)

        return run

    names = {
        "tiny": "tiny",
        "steps": "peaks",
        "longest": "longest",
        "clock": "clocked",
        "decomposition": "matrices",
        "tests": "marked",
    }
    return {stage: of(module) for stage, module in names.items()}


def run_stages(suite: Suite, wanted: dict[str, StageRun]) -> int:
    """Each stage for its seconds, then those that were cut short for what is left; gives the exit status."""
    lost = suite.rows.bury()
    if lost is not None:
        say(f"{lost['case']}: {lost['reason']}")
    cut = [stage for stage in wanted if not _within(suite, stage, wanted[stage], _budget(suite, stage))]
    cut = [stage for stage in cut if not _within(suite, stage, wanted[stage], suite.left())]
    waits = time.time() + min(WAIT_S, suite.left())
    while suite.predictions.waiting() and time.time() < waits:
        time.sleep(0.2)
        suite.predictions.collect()
    if cut:
        say(f"{', '.join(cut)}: time is up; what is done is kept, the same command goes on from there")
        return UNFINISHED
    return FAILURES if any(row["status"] in (FAILED, LOST) for row in suite.rows.latest()) else OK


def _budget(suite: Suite, stage: str) -> float:
    """A stage's seconds, less what a process before this one took of them; the first one's hold the start."""
    seconds = BUDGETS[stage] * (PATIENCE if suite.run.rehearsal else 1)
    if stage == next(iter(BUDGETS)):
        return seconds - _since(suite)
    row = suite.rows.find(_begun(stage))
    before = time.time() - row["at"] if row is not None and row["run"] == suite.run.run else 0.0
    return seconds - before


def _begun(stage: str) -> str:
    return f"stage | {stage}"


def _within(suite: Suite, stage: str, run: StageRun, seconds: float) -> bool:
    """Run a stage for some seconds; gives whether it came to its end."""
    seconds = min(seconds, suite.left())
    if seconds < LEAST_S:
        return False
    row = suite.rows.find(_begun(stage))
    if row is None or row["run"] != suite.run.run:
        suite.rows.append("stage", _begun(stage), RAN, at=time.time(), after_s=round(_since(suite), 1))
    finished = _finished(suite, run, seconds)
    if not finished:
        say(f"{stage}: its {seconds:.0f} seconds are over")
    suite.device.release()
    return finished


def _finished(suite: Suite, run: StageRun, seconds: float) -> bool:
    try:
        with suite.limited(seconds):
            run(suite)
    except OutOfTime:
        return False  # and with the traceback, what the case at hand held is free for the next stage
    return True


def _since(suite: Suite) -> float:
    return time.time() - suite.started


def no_card() -> str | None:
    """Why nothing can be measured here, in one line, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; try the suite's own code with --rehearse"
    try:
        import bitsandbytes

        bitsandbytes.functional.quantize_4bit(torch.zeros(64, 64, device="cuda"), quant_type="nf4")
        torch.cuda.synchronize()
    except Exception as error:  # a wheel without this card's kernels fails in many ways
        return f"bitsandbytes cannot quantise on this card: {str(error).splitlines()[0] if str(error) else error!r}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stages.py", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=BUDGETS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--started", type=float, required=True, help="when the command began, seconds since 1970")
    parser.add_argument("--ends", type=float, required=True, help="when the measuring must be over")
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    trouble = None if options.rehearse else no_card()
    if trouble:
        print(f"card.sh: {trouble}", file=sys.stderr)
        return CANNOT_RUN
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device: Card | Rehearsal = Rehearsal() if options.rehearse else Card()
    plan = REHEARSAL if options.rehearse else FULL
    run = Run.begin(machine(device.kind), options.rehearse, options.started, options.commit)
    rows = Rows(options.output, run)
    predictions = Predictions(rows, side_jobs(options.rehearse))
    suite = Suite(options.output, device, plan, run, rows, predictions, options.started, options.ends)
    table = stage_table()
    try:
        predictions.ask(
            list(steps_of(plan)) if "steps" in options.stages else [],
            list(searches_of(plan)) if "longest" in options.stages else [],
        )
    except (OSError, RuntimeError) as error:  # they can be counted anywhere, what a card says only there
        say(f"predictions: not counted here: {error}")
    try:
        return run_stages(suite, {stage: table[stage] for stage in BUDGETS if stage in options.stages})
    except ContextLost:
        say("the CUDA context is lost; another process goes on")
        return AGAIN
    finally:
        predictions.close()


if __name__ == "__main__":
    gc.freeze()  # what was imported stays; collecting it anew after each case takes as long as a small case
    sys.exit(main())
