"""The tables of docs/paper.md, made of the experiments: `python docs/paper_tables.py` writes them anew."""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).with_name("paper.md")
ROOT = PAGE.parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.paper.counts import counted  # noqa: E402
from benchmarks.paper.experiment import Experiment, read_experiment  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "paper"
"""What was measured: a folder for each experiment, with the results.json that it writes."""
MARK = "<!-- {}: written by docs/paper_tables.py -->\n\n"
END = "<!-- end -->\n"
NOT_RUN = "not run"
HEADINGS = ["method", "trained", "trained, by the paper"]


class Column(NamedTuple):
    """A column of the paper's numbers: what it is called, of which experiment, and which of its sets."""

    heading: str
    experiment: str
    asked: str


def _each(name: str) -> list[Column]:
    return [Column(asked, name, asked) for asked in read_experiment(name).asked]


def tables() -> dict[str, list[Column]]:
    """By the name of each table its columns; the methods are those of the first one's experiment."""
    tasks = ("MNLI", "SST-2", "MRPC", "CoLA", "QNLI", "QQP", "RTE", "STS-B")
    images = ("CIFAR100", "Flowers102", "Food101", "RESISC45")
    alone = (
        "table-1-gemma-2b", "table-1-gemma-7b", "table-1-llama-3-8b", "table-2-gemma-7b", "table-8-gemma-2b",
        "table-5-gemma-2b", "table-10-gemma-2b", "figure-4-gemma-2b", "gsm8k-smollm2",
    )  # fmt: skip
    return {
        **{name: _each(name) for name in alone},
        "table-3": [Column(task, f"table-3-{task.lower()}", task) for task in tasks],
        **{
            f"table-4-vit-{size}": [Column(one, f"table-4-{one.lower()}-vit-{size}", one) for one in images]
            for size in ("b", "l")
        },
        "table-6": [Column(steps, f"table-6-pythia-{steps.lower()}", "GSM8K") for steps in ("39K", "143K")],
    }


def rows(columns: list[Column]) -> list[list[str]]:
    """A row a method: what is counted, what the paper has, and what was measured here."""
    experiments = {one.experiment: read_experiment(one.experiment) for one in columns}
    first = next(iter(experiments.values()))
    printed = any(method.paper for method in first.methods.values())
    eight = len({one.experiment for one in columns}) == 1 and len(columns) == 8  # the paper has their mean, too
    kept = columns if printed else []
    made = [[*HEADINGS[: 3 if printed else 2], *(one.heading for one in kept), *["mean"] * eight, "ours"]]
    for method in first.methods.values():
        said = [experiments[one.experiment].methods[method.name].paper.get(one.asked) for one in kept]
        mean = [_mean(said) if said and None not in said else ""] * eight
        papers = [str(method.paper.get("trained", ""))] if printed else []
        ours = _measured(columns, method.name)
        made.append([method.name, f"{counted(first, method):,}", *papers, *map(_number, said), *mean, ours])
    if first.name.startswith("table-1-"):  # the experiments of the later paper are these, with its own rows
        for name, numbers in read_experiment(first.name.replace("table-1", "pica")).published.items():
            made.append([name, "", numbers["trained"], *(_number(numbers[one.asked]) for one in kept), "no package"])
    return made


def _mean(values: list[float]) -> str:
    """As written numbers, so that a half is rounded up, as the paper does."""
    mean = sum(Decimal(str(value)) for value in values) / len(values)
    return str(mean.quantize(Decimal("0.01"), ROUND_HALF_UP))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _measured(columns: list[Column], method: str) -> str:
    """The means over seeds of what was measured here, in the order of the columns."""
    found = []
    for column in columns:
        path = RESULTS / column.experiment / "results.json"
        done: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        scores = [row["scores"].get(column.asked) for row in done if row["method"] == method]
        values = [next(iter(one.values())) for one in scores if one]
        found.append(f"{statistics.mean(values):.2f}" if values else NOT_RUN)
    return NOT_RUN if set(found) == {NOT_RUN} else " / ".join(found)


def differing(experiments: Iterable[Experiment]) -> list[str]:
    """Why the paper's counts are other ones, a line for each, those alike told once."""
    found = {}
    for experiment in experiments:
        for method in experiment.methods.values():
            if method.counts:
                found.setdefault((method.name, method.counts), method)
    return [f"- {name} ({method.paper['trained']}): {counts}." for (name, counts), method in found.items()]


def markdown(made: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in made]
    return "\n".join([lines[0], f"|{' --- |' * len(made[0])}", *lines[1:]])


def section(columns: list[Column]) -> str:
    """A table, and why counts differ."""
    experiments = {one.experiment: read_experiment(one.experiment) for one in columns}
    why = differing(experiments.values())
    return "\n\n".join([markdown(rows(columns)), *(["Counts that differ:\n\n" + "\n".join(why)] if why else [])])


def page_with_tables(page: str) -> str:
    """The page with all tables as they are made now."""
    for name, columns in tables().items():
        before, mark, after = page.partition(MARK.format(name))
        if not mark:
            raise ValueError(f"{PAGE}: found no mark of {name}; expected {MARK.format(name).strip()}")
        page = f"{before}{mark}{section(columns)}\n\n{END}{after.partition(END)[2]}"
    return page


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # PEFT uses transformers' old names
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
