"""The paper's experiments, one command each.

    python -m benchmarks.paper                                   which there are
    python -m benchmarks.paper table-1-gemma-2b --dry-run        what each run takes
    python -m benchmarks.paper table-1-gemma-2b                  data, training, asking, scores, and the table
    python -m benchmarks.paper table-1-gemma-2b --methods qsvft "LoRA r=32" --seeds 0 1 2
    python -m benchmarks.paper table-1-gemma-2b --model DIR --data train=FILE "GSM8K=FILE" --rows 64 --ask 32
    python -m benchmarks.paper --counts                          trained numbers beside the paper's

Whatever it is stopped by, the same command goes on: no step, no answer and no score is done twice.
Exit status 0; 1: a run came to no end, or another process has it in hand, the others are done; 2: it could not begin.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from filelock import FileLock

from qsvft.options.recipe import load_yaml
from qsvft.storage.whole_files import write_whole

from .experiment import WHOLE, Experiment, Method, names, read_experiment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "results.json"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiments", nargs="*", metavar="NAME", help="an experiment, or a YAML file of one's own")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="some of the experiment's")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="in place of the experiment's")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "paper", metavar="DIR")
    parser.add_argument("--model", metavar="DIR", help="in place of the hub's")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="a file or directory in place of the hub's data"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="to train on, at most")
    parser.add_argument("--ask", type=int, metavar="N", help="rows to ask of each set, at most")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="of an answer, at most")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the trainer")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), help="how every base is held")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows asked at once")
    parser.add_argument("--dry-run", action="store_true", help="say what each run would take, and write nothing")
    parser.add_argument("--report", action="store_true", help="only show the tables of what is done")
    parser.add_argument("--counts", action="store_true", help="trained numbers beside the paper's")
    return parser.parse_args(arguments)


def chosen(name: str, told: argparse.Namespace) -> Experiment:
    """An experiment with what was said on the command line.

    Raises:
        ValueError: it is not there, or something that was said does not go with it.
    """
    changed = dict(_pair(text, "--set") for text in told.set)
    found = read_experiment(name, lambda table: _replace_data(table, told))
    training = {**found.training, **{key: load_yaml(value) for key, value in changed.items()}}
    methods = {
        one: replace(
            method,
            bits=told.bits if told.bits is not None and method.way not in WHOLE else method.bits,
            training={key: value for key, value in method.training.items() if key not in changed},
        )
        for one, method in found.methods.items()
    }
    if told.methods:
        for one in told.methods:
            if one not in methods:
                near = difflib.get_close_matches(one, methods, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name}: --methods: found {one!r}; expected some of {', '.join(methods)}.{hint}")
        methods = {one: method for one, method in methods.items() if one in told.methods}
    return replace(
        found, model=told.model or found.model, training=training, methods=methods, seeds=told.seeds or found.seeds
    )


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ValueError(f"{option} {text}: expected NAME=VALUE")
    return name, value


def _replace_data(table: dict[str, Any], told: argparse.Namespace) -> None:
    asked = table.get("asked") or {}
    for text in told.data:
        name, path = _pair(text, "--data")
        if name != "train" and name not in asked:
            raise ValueError(f"--data {text}: found {name!r}; expected train or one of {', '.join(asked)}")
        if not Path(path).exists():
            raise ValueError(f"--data {text}: there is no such file or directory; expected one")
        data = table["train"] if name == "train" else asked[name]
        data.update(dataset=str(Path(path).absolute()), config=None, split="train")
    for data in asked.values():
        if told.new_tokens is not None:
            data["max_new_tokens"] = told.new_tokens
    for limit, found in ((told.rows, [table.get("train") or {}]), (told.ask, list(asked.values()))):
        if limit is not None:
            if limit < 1:
                raise ValueError(f"--rows, --ask: found {limit}; expected at least 1")
            for data in found:
                data["first"] = min(limit, data.get("first") or limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for."""
    told = options(arguments)
    try:
        if told.counts:
            from rich.console import Console

            from .counts import table as counts

            Console().print(counts(told.experiments or names()))
            return 0
        if not told.experiments:
            print("\n".join(f"{name:<28}{read_experiment(name).about}" for name in names()))
            return 0
        experiments = [chosen(name, told) for name in told.experiments]
        return sum([_all_runs(experiment, told) for experiment in experiments]) and 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _all_runs(experiment: Experiment, told: argparse.Namespace) -> int:
    """How many runs of an experiment came to no end; its table is shown and written."""
    from rich.console import Console

    from qsvft.training.progress import bars_of_datasets
    from qsvft.training.train import TrainingError

    from .forecast import check, forecast
    from .report import table
    from .run import OneRun

    def say(text: str) -> None:
        print(text, flush=True)

    def run_of(of: Experiment, method: Method, seed: int = 0) -> OneRun:
        return OneRun(of, method, seed, told.output, told.batch_size, say)

    runs = [run_of(experiment, method, seed) for method in experiment.methods.values() for seed in experiment.seeds]
    failed = 0
    with bars_of_datasets():
        for run in runs:
            if run.done or told.report:
                continue
            run.check()
            say(f"{experiment.name}, {run.method.name}, seed {run.seed}")
            if run.trained is None:
                found = forecast(run)
                say(f"  {found}")
                if not told.dry_run:
                    check(run, found, run_of)
            if told.dry_run:
                continue
            try:
                run.go()
            except TrainingError as error:
                print(f"error: {run.method.name}: {error}", file=sys.stderr)
                if error.interrupted:
                    raise SystemExit(130) from None
                failed += 1
            except ValueError as error:  # another process has it in hand: the next one is free
                print(f"error: {run.method.name}: {error}", file=sys.stderr)
                failed += 1
    if not told.dry_run:
        done = [run.row() for run in runs if run.done]
        if done:
            _write(told.output / experiment.name / RESULTS, done)
        Console(width=None if sys.stdout.isatty() else 200).print(table(experiment, done))
    return failed


def _write(path: Path, done: Sequence[Mapping[str, Any]]) -> None:
    """Rows into a file of results, in the place of those of the same runs; those of others stay."""
    with FileLock(path.with_name(f".{path.name}.lock")):  # processes that share the runs end at the same time
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            before = []
        rows = {(row["method"], row["seed"]): row for row in (*before, *done)}
        write_whole(path, json.dumps(list(rows.values()), indent=1).encode() + b"\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    # A hub that cannot be reached is said once, in one line, not at each retry.
    getLogger("huggingface_hub").setLevel(ERROR)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    sys.exit(main())
