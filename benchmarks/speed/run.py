"""The clock: whole training steps and single adapted linears of every method, their floors, and how they grow.

    python benchmarks/speed/run.py --short                          two minutes on two cores
    python benchmarks/speed/run.py --output DIR                     everything, an hour or more on a CPU
    python benchmarks/speed/run.py layers --shapes llama-3-8b --tokens 1024 --methods qsvft svft
    python benchmarks/speed/run.py models --model SMOLLM2

Every finished case is a line of results.jsonl before the next one begins; the same command goes on behind the last one.
speed.json has all that is there, with machine, versions and commit. README.md says what each number means. Let nothing
else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import compiled
import floor
import grouped
import growth
import layers
import models
import picture
import psutil
import report
import rivals
import sizes
import torch
from bench import Bench
from clock import LEAST
from results import ROOT, Rows, Run, machine
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from qsvft.storage.whole_files import write_whole

SHORT_SECTIONS = ("layers", "models", "floor", "growth")
SECTIONS = (*SHORT_SECTIONS, "compiled", "grouped")
OUTPUT, SHORT = ROOT / "benchmarks" / "results" / "speed", ROOT / "out" / "speed"
SHORT_TOKENS = 256
FAILED = 4


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for; ends with one line where that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="|".join(SECTIONS), help="what to measure; all if none is named")
    parser.add_argument("--short", action="store_true", help="few methods, small shapes, three rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own number if it is not given")
    parser.add_argument(
        "--methods", nargs="+", metavar="TEXT", help="as qsvft profile reads them; QLoRA is always there"
    )
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="layers of these presets or directories")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="of a layer's input")
    parser.add_argument("--models", nargs="*", metavar="NAME", help=f"whole models: {', '.join(sizes.models())}")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint to step as well")
    parser.add_argument("--rounds", type=int, help="at most; at least 3")
    parser.add_argument("--seconds", type=float, help="of a case's rounds, about")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the results; which, is said at the end")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="the growth as a picture: its name in the output folder"
    )
    told = parser.parse_args(arguments)
    _fill_in(told)
    try:
        _check(told)
        told.rivals = rivals.chosen(told.methods, told.short)
        for name in told.shapes:
            sizes.one_layer(name)
    except ValueError as error:
        parser.error(str(error))
    return told


def _fill_in(told: argparse.Namespace) -> None:
    short = told.short
    told.sections = told.sections or list(SHORT_SECTIONS if short else SECTIONS)
    told.shapes = told.shapes or ([sizes.NARROW] if short else list(sizes.LAYERS))
    told.tokens = told.tokens or ([256] if short else list(sizes.TOKENS))
    if told.models is None:
        told.models = [sizes.NARROW] if short else [name for name in sizes.models() if name != sizes.TINY]
    told.rounds = told.rounds or (LEAST if short else 12)
    told.seconds = told.seconds or (4.0 if short else 60.0)
    told.output = told.output or (SHORT if short else OUTPUT) / told.device


def _check(told: argparse.Namespace) -> None:
    for section in told.sections:
        if section not in SECTIONS:
            raise ValueError(f"unknown section {section!r}; expected some of {', '.join(SECTIONS)}")
    for name in told.models:
        if name not in sizes.models():
            raise ValueError(f"--models: unknown model {name!r}; expected some of {', '.join(sizes.models())}")
    if min(told.tokens) < 1:
        raise ValueError(f"--tokens: found {min(told.tokens)}; expected at least 1")
    if told.rounds < LEAST:
        raise ValueError(f"--rounds: found {told.rounds}; expected at least {LEAST}, or there is no spread")
    if told.threads is not None and told.threads < 1:
        raise ValueError(f"--threads: found {told.threads}; expected at least 1")
    if told.model is not None and not (told.model / "config.json").is_file():
        raise ValueError(f"--model: {told.model} holds no config.json; expected a checkpoint's directory")
    if told.plot is not None and told.plot.suffix not in picture.FORMATS:
        raise ValueError(f"--plot: found {told.plot.name}; expected a file ending in {', '.join(picture.FORMATS)}")
    if told.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; expected one, or --device cpu")


def processor() -> str:
    """The CPU's name as its maker says it, its architecture where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def about(device: str) -> dict[str, Any]:
    """The machine: nothing that names the computer."""
    cores = psutil.cpu_count(logical=False)
    return {**machine(device), "cpu": processor(), "cores": cores, "threads": torch.get_num_threads()}


def measure(told: argparse.Namespace, console: Console) -> Rows:
    """Every section that was asked for."""
    rows = Rows(told.output, Run.begin(about(told.device), told.short, time.time()))
    bench = Bench(rows, told.rivals, told.device, told.rounds, told.seconds, console)
    whole = [sizes.models()[name] for name in told.models]
    if told.short:
        whole = [replace(model, tokens=min(model.tokens, SHORT_TOKENS)) for model in whole]
    if "layers" in told.sections:
        layers.run(bench, told.shapes, told.tokens)
    if "models" in told.sections:
        models.run(bench, whole, told.model)
    if "floor" in told.sections:
        floor.run(bench, told.shapes, told.tokens, whole, told.short)
    if "compiled" in told.sections:
        compiled.run(bench, whole)
    if "grouped" in told.sections:
        grouped.run(bench, told.shapes, told.tokens)
    if "growth" in told.sections:
        start, axes = (growth.SMALL, ("tokens", "rank")) if told.short else (growth.Point(), growth.AXES)
        growth.run(bench, start, axes)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and show. Exit status 0, or 4 if a case has no result."""
    told, console = options(arguments), Console(stderr=True)
    if told.threads is not None:
        torch.set_num_threads(told.threads)
    told.output.mkdir(parents=True, exist_ok=True)
    rows = measure(told, console)
    found = rows.latest()
    results = {"run": asdict(rows.run), "rows": found}
    write_whole(told.output / "speed.json", json.dumps(results, indent=1, allow_nan=False).encode() + b"\n")
    report.show(found, Console())
    console.print(f"written to {told.output}", highlight=False)
    grown = [row for row in found if row["stage"] == growth.STAGE and row["status"] == "ran"]
    if told.plot is not None and grown:
        picture.draw(grown, told.output / told.plot.name)
    return 0 if all(row["status"] == "ran" for row in found) else FAILED


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    sys.exit(main())
