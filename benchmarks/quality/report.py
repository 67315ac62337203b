"""Tables and pictures of the runs that there are.

    python benchmarks/quality/report.py --runs DIRECTORY --study NAME [--costs FILE] [--pictures DIRECTORY] [--all]

A method stands with its best learning rate: that of the least held-out loss with the first seed. A loss has the mean
and the range over the seeds there; "of full" is the part of full fine-tuning's gain; "own text" is how much the loss of
a text that the model wrote itself has grown, "other text" that of questions of another task. A rate with a star is at
the edge of what was tried. ``--all`` prints every run. ``costs.py`` writes the file of what a step costs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from runs import Runs, results
from studies import UNTRAINED, Job, jobs
from sweep import best_rate

FULL = "full fine-tuning"
FORGOTTEN = {"own text": "own_text", "other text": "other_text"}
STEPS = {"step": "step", "step, 8B": "step_8b"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Best:
    """A job's runs at its best rate, and what was tried."""

    job: Job
    rate: float
    tried: tuple[float, ...]
    rows: tuple[Row, ...]

    def values(self, figure: str) -> list[float]:
        """A figure of each seed."""
        return [row[figure] for row in self.rows if row.get(figure) is not None]

    def mean(self, figure: str) -> float | None:
        """A figure's mean over the seeds, None where no run has it."""
        values = self.values(figure)
        return mean(values) if values else None

    @property
    def rate_text(self) -> str:
        own_sweep = self.job.swept is None and self.job.rate is None
        at_edge = own_sweep and self.rate in (min(self.tried), max(self.tried))
        return f"{self.rate:g}{'*' if at_edge else ''}"


def found_best(job: Job, rows: Sequence[Row]) -> Best | None:
    """A job at its best rate, None where it has no run that went to its end."""
    losses = job.losses(rows)
    tried = losses.get(job.seeds[0], {})
    rate = best_rate(tried)
    if rate is None:
        return None
    chosen = [row for row in job.rows(rows) if row["rate"] == rate and row.get("loss") is not None]
    return Best(job, rate, tuple(sorted(tried)), tuple(sorted(chosen, key=lambda row: row["seed"])))


def table_of(task: str, found: Sequence[Best], before: Row | None, costs: dict[str, Row]) -> Table:
    """One row a method, the best first."""
    full = next((best for best in found if best.job.method.name == FULL), None)
    job = found[0].job
    table = Table(
        title=f"{task}: loss of {job.held_out} held out, {job.steps} steps of {job.batch_size}, base {job.held}"
    )
    table.add_column("method", no_wrap=True)
    for column in ("trained", "rate", "seeds", "loss", "range", "accuracy", "of full", *FORGOTTEN, "peak GiB", *STEPS):
        table.add_column(column, justify="right")
    if before is not None:
        table.add_row(UNTRAINED, *[""] * 3, f"{before['loss']:.4f}", "", _percent(before.get("accuracy")), *[""] * 6)
    for best in sorted(found, key=lambda best: best.mean("loss") or math.inf):
        losses, cost = best.values("loss"), costs.get(best.job.method.name, {})
        gain, forgotten = "", [""] * len(FORGOTTEN)
        if before is not None:
            if full is not None:
                share = (before["loss"] - mean(losses)) / (before["loss"] - mean(full.values("loss")))
                gain = f"{share:.1%}"
            forgotten = [_growth(best.mean(name), before.get(name)) for name in FORGOTTEN.values()]
        table.add_row(
            best.job.method.name,
            f"{best.rows[0]['trainable_parameters'] / 1e6:.2f}M",
            best.rate_text,
            str(len(losses)),
            f"{mean(losses):.4f}",
            f"{min(losses):.4f} {max(losses):.4f}",
            _percent(best.mean("accuracy")),
            gain,
            *forgotten,
            f"{cost['peak_gib']:.2f}" if "peak_gib" in cost else "",
            *(f"{cost[name]:.2f}" if name in cost else "" for name in STEPS.values()),
        )
    return table


def _growth(after: float | None, before: float | None) -> str:
    return "" if after is None or before is None else f"{after - before:+.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def every_run(rows: Sequence[Row]) -> Table:
    """One row a run, as they came."""
    table = Table(title="every run")
    for column in ("task", "method", "rate", "seed", "steps", "loss", "stopped", "commit"):
        table.add_column(column)
    for row in rows:
        loss = "" if row.get("loss") is None else f"{row['loss']:.4f}"
        values = (row["rate"], row["seed"], row["steps"], loss, row.get("stopped", ""), row["commit"][:8])
        table.add_row(row["task"], row["method"], *map(str, values))
    return table


AXES = {
    "trained parameters": lambda best, cost: best.rows[0]["trainable_parameters"],
    "predicted peak on Llama-3-8B, GiB": lambda best, cost: cost.get("peak_gib"),
    "step 1024 wide, in QLoRA's": lambda best, cost: cost.get("step"),
}
TICKS = {
    "predicted peak on Llama-3-8B, GiB": (6, 7, 8, 10, 12, 16, 24),
    "step 1024 wide, in QLoRA's": (1, 1.2, 1.5, 2, 3),
}


def draw(title: str, found: Sequence[Best], costs: dict[str, Row], path: Path) -> None:
    """Held-out loss against parameters, peak and time: a number a method, its range over seeds, the front as a line."""
    from matplotlib.figure import Figure

    ordered = sorted(found, key=lambda best: best.mean("loss") or math.inf)
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, len(AXES) + 1, sharey=True, width_ratios=(*[1] * len(AXES), 0.9))
    for axes, (label, value) in zip(panels, AXES.items(), strict=False):
        points = [(value(best, costs.get(best.job.method.name, {})), best) for best in ordered]
        points = [(x, best) for x, best in points if x is not None]
        for x, best in points:
            losses = best.values("loss")
            axes.plot([x, x], [min(losses), max(losses)], color=_color(best), linewidth=1, alpha=0.6)
            axes.plot(x, mean(losses), "o", color=_color(best), markersize=4)
            axes.annotate(
                ordered.index(best) + 1, (x, mean(losses)), xytext=(4, 3), textcoords="offset points", fontsize=8
            )
        if points:
            front = _front([(x, mean(best.values("loss"))) for x, best in points])
            axes.step(*zip(*front, strict=True), where="post", color="grey", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        if label in TICKS:
            axes.set_xticks(TICKS[label], labels=map(str, TICKS[label]))
            axes.minorticks_off()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"held-out loss, {title}")
    panels[-1].axis("off")
    for place, best in enumerate(ordered):
        text = f"{place + 1}  {best.job.method.name}: {best.mean('loss'):.3f}"
        height = 1 - (place + 1) / (len(ordered) + 1)
        panels[-1].text(0, height, text, transform=panels[-1].transAxes, fontsize=8, color=_color(best))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _color(best: Best) -> str:
    return "tab:blue" if best.job.method.package == "qsvft" else "tab:orange"


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other betters in both."""
    front: list[tuple[float, float]] = []
    for x, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((x, loss))
    return front


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--study", nargs="+", required=True)
    parser.add_argument("--costs", type=Path, help="what costs.py wrote")
    parser.add_argument("--pictures", type=Path, help="the folder to draw in")
    parser.add_argument("--all", action="store_true", help="print every run too")
    options = parser.parse_args(arguments)
    rows = list(results.read(options.runs / "runs.jsonl"))
    costs = json.loads(options.costs.read_text(encoding="utf-8")) if options.costs else {}
    console = Console(width=170)
    alike: dict[tuple[Any, ...], list[Best]] = {}
    for job in jobs(options.study):
        if (best := found_best(job, rows)) is not None:
            alike.setdefault((job.task, job.held, job.steps, job.batch_size, job.held_out), []).append(best)
    for found in alike.values():
        job = found[0].job
        before = next((row for row in rows if Runs.same(row, job.untrained())), None)
        console.print(table_of(job.task, found, before, costs))
        if options.pictures:
            setting = f"{job.task}, {job.steps} steps of {job.batch_size}"
            draw(setting, found, costs, options.pictures / f"{job.task}-{job.steps}x{job.batch_size}-{job.held}.png")
    if options.all:
        console.print(every_run(rows))


if __name__ == "__main__":
    main()
