"""The stages: tests, memory, speed, decomposition. Called by run.sh, which prepares the environment.

Every finished case is a row on the disk before the next one begins; a case that has its row is skipped.
A stage stops by itself before its nine minutes are over, and the same command goes on from there.

Exit status: 0 all cases have a result, 1 something failed, 2 cannot run here, 3 time was up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import FAILED, ROOT, Rows, Run, machine, safe_name

if TYPE_CHECKING:
    from cases import Plan
    from predictions import Predictions
    from steps import Card, Rehearsal

STAGES = ("tests", "memory", "speed", "decomposition")
NEEDED = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors", "typer", "rich", "psutil")
SOFT_LIMIT_S, HARD_LIMIT_S = 480, 530
HEADROOM = 1.08
OK, FAILURES, CANNOT_RUN, UNFINISHED = 0, 1, 2, 3


class OutOfTime(BaseException):
    """The stage's time is up; no ordinary handler may take it for a case's failure."""


class Suite:
    """What the stages share: where results go, the device, the plan and the predictions."""

    def __init__(self, folder: Path, rehearsal: bool) -> None:
        import steps
        from cases import FULL, REHEARSAL
        from predictions import Predictions

        self.rehearsal, self.folder = rehearsal, folder
        self.device: Card | Rehearsal = steps.Rehearsal() if rehearsal else steps.Card()
        self.plan: Plan = REHEARSAL if rehearsal else FULL
        self.run = Run.begin(machine(self.device.kind), rehearsal)
        jobs = 0 if rehearsal else max(1, min(8, (os.cpu_count() or 2) - 2))
        self.predictions: Predictions = Predictions(self.rows("predictions"), jobs)
        self.code = OK
        self._end = 0.0

    def rows(self, stage: str) -> Rows:
        return Rows(self.folder / f"{stage}.jsonl", self.run)

    def failed(self) -> None:
        self.code = self.code or FAILURES

    @contextmanager
    def limited(self, stage: str) -> Iterator[None]:
        """Run a stage within its time; what is left over is for the next call."""
        self._end = time.monotonic() + SOFT_LIMIT_S

        def stop(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, HARD_LIMIT_S)
        try:
            yield
        except OutOfTime:
            self.code = UNFINISHED
            say(f"{stage}: time is up; what is done is kept, run the same command again for the rest")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def check_time(self) -> None:
        if time.monotonic() > self._end:
            raise OutOfTime


def say(text: str) -> None:
    print(text, flush=True)


# --- (a) tests ------------------------------------------------------------------------------------


def tests(suite: Suite) -> None:
    """The whole test suite, those that need CUDA first; in a rehearsal those alone, which skip themselves."""
    path, log = suite.folder / "tests.jsonl", suite.folder / "tests.log"
    what = [str(ROOT / "tests" / "cuda")] if suite.rehearsal else [str(ROOT / "tests")]
    kind = "cpu" if suite.rehearsal else "cuda"
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("recorder.py")), str(path), kind, *what]
    suite.folder.mkdir(parents=True, exist_ok=True)
    say(f"tests: pytest writes {log.name}")
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    rows = suite.rows("tests")
    say(f"tests: {summary_line(rows)}")
    # pytest: 0 passed, 1 some failed, 5 none was left to run.
    if status not in (0, 5) or any(row["status"] == FAILED for row in rows.latest()):
        say(f"tests: pytest ended with {status}, see {log.name}")
        suite.failed()


def summary_line(rows: Rows) -> str:
    counts: dict[str, int] = {}
    for row in rows.latest():
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "no test ran"


# --- (b) memory -----------------------------------------------------------------------------------


def memory(suite: Suite) -> None:
    """Predicted, allocated and reserved bytes of every method."""

    def measure(scenario: Any, case: tuple[str, str, int], predicted: dict[str, Any], other: int) -> dict[str, Any]:
        found = suite.device.peak(scenario, case[2], other)
        return {**found, "difference_bytes": found["allocated_bytes"] - predicted["predicted_bytes"]}

    rows = suite.rows("memory")
    for model in suite.plan.models:
        for method in suite.plan.methods:
            lengths = [n for n in suite.plan.lengths if not rows.done(_name(model, method, n))]
            _measure(suite, rows, model, method, lengths, measure)


# --- (c) speed ------------------------------------------------------------------------------------


def speed(suite: Suite) -> None:
    """Step times, and their ratio to qlora's in the same run."""
    from steps import spread

    reference: dict[tuple[str, int], float] = {}

    def measure(scenario: Any, case: tuple[str, str, int], predicted: dict[str, Any], other: int) -> dict[str, Any]:
        model, method, seq_len = case
        times = suite.device.times(scenario, seq_len, suite.plan)
        found: dict[str, Any] = {**spread(times), "times_ms": times}
        found["tokens_per_s"] = 1000 * seq_len / found["median_ms"]
        if method == "qlora":
            reference[model, seq_len] = found["median_ms"]
        base = reference.get((model, seq_len))
        found["times_qlora"] = None if base is None else found["median_ms"] / base
        return found

    rows = suite.rows("speed")
    others = [method for method in suite.plan.methods if method != "qlora"]
    for model in suite.plan.models:
        open_cases = {m: [n for n in suite.plan.lengths if not rows.done(_name(model, m, n))] for m in others}
        # A ratio is taken within one run, so qlora is timed again before what is left over.
        again = {n for lengths in open_cases.values() for n in lengths}
        first = [n for n in suite.plan.lengths if n in again or not rows.done(_name(model, "qlora", n))]
        _measure(suite, rows, model, "qlora", first, measure, optimizer="adamw, fused", autocast="bfloat16")
        for method in others:
            lengths = open_cases[method]
            _measure(suite, rows, model, method, lengths, measure, optimizer="adamw, fused", autocast="bfloat16")


# --- (d) decomposition ----------------------------------------------------------------------------


def decomposition(suite: Suite) -> None:
    """Seconds and accuracy of each way to decompose a weight, by benchmarks/decomposition.py."""
    rows, case = suite.rows("decomposition"), "llama-2-7b"
    if rows.done(case):
        return
    path, log = suite.folder / "decomposition.json", suite.folder / "decomposition.log"
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "decomposition.py"), "--json", str(path)]
    command += ["--quick"] if suite.rehearsal else ["--device", "cuda"]
    suite.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, "ab") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            raise
    ran = status == 0
    found = {"figures": json.loads(path.read_text())} if ran else {"reason": f"ended with {status}, see {log.name}"}
    rows.append(case, "ran" if ran else FAILED, **found, seconds=round(time.monotonic() - start, 3))
    say(f"decomposition: {'ran' if ran else found['reason']}; the table is in {log.name}")
    if not ran:
        suite.failed()


# --- one model and method, at the lengths that are open -------------------------------------------

Measure = Callable[[Any, tuple[str, str, int], dict[str, Any], int], dict[str, Any]]


def _measure(
    suite: Suite,
    rows: Rows,
    model: str,
    method: str,
    lengths: list[int],
    measure: Measure,
    optimizer: str = "adamw",
    autocast: str = "off",
) -> None:
    """Build a method once and measure it at each length that fits the card; write a row for each."""
    import torch
    from cases import BATCH_SIZE
    from steps import CHECKPOINTING, build, factors_of

    from qsvft.memory.methods import parse_method
    from qsvft.memory.presets import model_config
    from qsvft.memory.scenario import one_line

    if not lengths:
        return
    suite.check_time()
    parsed = parse_method(method)
    settings = {"batch_size": BATCH_SIZE, "checkpointing": CHECKPOINTING, "optimizer": optimizer, "autocast": autocast}
    about = {"model": model, "method": method, **settings, "factors": factors_of(parsed)}
    predicted = {n: suite.predictions.get((model, method, n)) for n in lengths}
    free = suite.device.free_bytes()
    scenario, before = None, 0
    for seq_len in lengths:
        case, prediction, start = _name(model, method, seq_len), predicted[seq_len], time.monotonic()
        row = {**about, "seq_len": seq_len, "predicted_bytes": prediction.get("predicted_bytes"), "free_bytes": free}
        refused = _too_large(prediction, parsed.bits, free)
        try:
            if prediction["status"] == FAILED:
                status, found = FAILED, {"reason": f"not predicted: {prediction['reason']}"}
            elif refused is not None:
                status, found = "not run", {"reason": refused}
            else:
                if scenario is None:
                    before = suite.device.allocated()
                    scenario = build(model_config(model), parsed, suite.device.kind)
                status, found = "ran", measure(scenario, (model, method, seq_len), prediction, before)
        except torch.OutOfMemoryError as error:
            status, found = "out of memory", {"reason": one_line(error)}
        except Exception as error:  # whatever a method's own package raises belongs in its row
            status, found = FAILED, {"reason": one_line(error)}
        if status == FAILED:
            suite.failed()
        rows.append(case, status, **row, **found, seconds=round(time.monotonic() - start, 3))
        say(f"{rows.path.stem}: {case}: {found.get('reason', status)}")
        suite.device.release()
        if "CUDA error" in str(found.get("reason")):
            raise SystemExit("run.sh: the CUDA context is lost after an error; run the same command again to go on")
    del scenario
    suite.device.release()


def _too_large(prediction: dict[str, Any], bits: int, free: int) -> str | None:
    """Why a case is not tried on this card, or None. A 4-bit model stands there in bf16 before it is quantised."""
    if prediction["status"] == FAILED:
        return None
    needs = {"the predicted peak": prediction["predicted_bytes"]}
    if bits == 4:
        needs["the bf16 weights before quantising"] = prediction["dense_bytes"]
    what, nbytes = max(needs.items(), key=lambda item: item[1])
    if nbytes * HEADROOM < free:
        return None
    gib = 2**30
    return f"{what}, {nbytes / gib:.2f} GiB, and 8 % over it are more than the {free / gib:.2f} GiB free"


def _name(model: str, method: str, seq_len: int) -> str:
    from cases import name

    return name(model, method, seq_len)


# --- the command ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.sh")
    parser.add_argument("stages", nargs="*", metavar="stage", help="tests, memory, speed, decomposition or summary")
    parser.add_argument("--rehearse", action="store_true", help="every stage's code on CPU at toy size")
    parser.add_argument("--output", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    unknown = [stage for stage in options.stages if stage not in (*STAGES, "summary")]
    if unknown:
        return refuse(f"unknown stage {unknown[0]!r}; expected tests, memory, speed, decomposition or summary")
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        return refuse(f"{', '.join(missing)} not installed here; install it or give its wheel with --wheels DIR")
    trouble = None if options.rehearse else no_card()
    if trouble:
        return refuse(trouble)
    folder = options.output or default_folder(options.rehearse)
    stages = [stage for stage in (options.stages or STAGES) if stage != "summary"]
    code = run_stages(folder, options.rehearse, stages) if stages else OK
    from summary import write_summary

    write_summary(folder)
    say(f"results: {folder}")
    return code


def run_stages(folder: Path, rehearsal: bool, stages: list[str]) -> int:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    suite = Suite(folder, rehearsal)
    if set(stages) & {"memory", "speed"}:
        plan = suite.plan
        suite.predictions.ask([(m, x, n) for m in plan.models for x in plan.methods for n in plan.lengths])
    functions = {"tests": tests, "memory": memory, "speed": speed, "decomposition": decomposition}
    try:
        for stage in STAGES:
            if stage in stages:
                with suite.limited(stage):
                    functions[stage](suite)
    finally:
        suite.predictions.close()
    return suite.code


def refuse(reason: str) -> int:
    print(f"run.sh: {reason}", file=sys.stderr)
    return CANNOT_RUN


def no_card() -> str | None:
    """Why nothing can be measured here, in one line, or None."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device; try the suite's own code with --rehearse"
    try:
        import bitsandbytes

        bitsandbytes.functional.quantize_4bit(torch.zeros(64, 64, device="cuda"), quant_type="nf4")
    except Exception as error:  # a wheel without this card's kernels fails in many ways
        return f"bitsandbytes cannot quantise on this card: {str(error).splitlines()[0] if str(error) else error!r}"
    return None


def default_folder(rehearsal: bool) -> Path:
    if rehearsal:
        return Path(tempfile.mkdtemp(prefix="qsvft-rehearsal-"))
    return ROOT / "benchmarks" / "results" / "gpu" / safe_name(machine("cuda")["card"])


if __name__ == "__main__":
    sys.exit(main())
