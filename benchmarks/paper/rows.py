"""The rows of a data set: of the hub, a directory or a file, those that were asked for."""

from __future__ import annotations

from datasets import Dataset

from qsvft.training.data import load_split

from .experiment import Data


def read_rows(data: Data, where: str, label: str | None = None) -> Dataset:
    """The rows that an experiment takes.

    Args:
        where: what errors begin with.
        label: the column of the classes of which ``per_class`` counts.

    Raises:
        ValueError: no such data, or no rows.
    """
    try:
        rows = load_split(data.dataset, data.config, data.split)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if data.seed is not None:
        rows = rows.shuffle(seed=data.seed)
    if data.per_class is not None and label is not None:
        rows = rows.select(_of_each(rows[label], data.per_class))
    if data.first is not None:
        rows = rows.select(range(min(data.first, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{where}: dataset {data.dataset!r}: found no rows; expected at least one")
    return rows


def _of_each(labels: list[object], most: int) -> list[int]:
    """The numbers of the first rows of each class."""
    seen: dict[object, int] = {}
    chosen = []
    for number, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= most:
            chosen.append(number)
    return chosen
