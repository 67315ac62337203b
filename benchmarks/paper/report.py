"""The table of an experiment: what was measured here beside what the paper has."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from .experiment import Experiment, Method

Row = Mapping[str, Any]
NOT_RUN = "not run"


def table(experiment: Experiment, rows: Sequence[Row]) -> Table:
    """A row a method; in each cell what was measured, and the paper's number in brackets.

    Args:
        rows: of the runs that are done.
    """
    found = Table("method", "trained", *experiment.asked, title=experiment.about)
    for method in experiment.methods.values():
        own = [row for row in rows if row["method"] == method.name]
        cells = [measured(own, name, method) for name in experiment.asked]
        found.add_row(*map(escape, (method.name, _trained(own, method), *cells)))  # brackets are no markup
    for name, numbers in experiment.published.items():
        papers = [_beside("", numbers.get(one)) for one in ("trained", *experiment.asked)]
        found.add_row(*map(escape, (name, *papers)))
    return found


def measured(rows: Sequence[Row], name: str, method: Method) -> str:
    """The mean over seeds and their range, and the paper's number; "not run" where no run is done."""
    values = [next(iter(row["scores"][name].values())) for row in rows if name in row["scores"]]
    if not values:
        return _beside(NOT_RUN, method.paper.get(name))
    mean = f"{statistics.mean(values):.2f}"
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return _beside(mean + spread, method.paper.get(name))


def _trained(rows: Sequence[Row], method: Method) -> str:
    counts = {row["trained"] for row in rows if "trained" in row}
    return _beside(", ".join(f"{count:,}" for count in sorted(counts)), method.paper.get("trained"))


def _beside(own: str, papers: Any) -> str:
    return own if papers is None else f"{own} (paper {papers})".strip()
