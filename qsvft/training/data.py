"""Rows to train on: from the hub, a directory or a file, in one of the forms that TRL's trainers take.

=====  =====================================================  ====================================
method columns                                                the loss is on
=====  =====================================================  ====================================
sft    ``messages``: turns of role and content                what the assistant says
sft    ``prompt``, ``completion``: texts, or turns            the completion
sft    ``text``                                               all of it
dpo    ``chosen``, ``rejected``, and ``prompt`` if it is apart  both answers
=====  =====================================================  ====================================

``templates`` make these columns of others: ``{"prompt": "Q: {question}\\nA:", "completion": " {answer}"}``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from ..options.run import RunOptions

FORMS = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
_MOST_HELD_OUT = 256


@dataclass(frozen=True)
class Rows:
    """What is trained on, and what is held out; None if nothing is."""

    train: Dataset
    held_out: Dataset | None

    @property
    def columns(self) -> tuple[str, ...]:
        """One of :data:`FORMS`."""
        return tuple(self.train.column_names)


def load_rows(run: RunOptions, seed: int = 42) -> Rows:
    """The rows of a run, those held out taken away.

    Args:
        run: dataset, method, templates, and what is held out.
        seed: of the rows that are held out where no others are given.

    Raises:
        ValueError: no such data, no rows, columns of another form; the message names the data, what was found and what
            is expected.
    """
    assert run.dataset is not None
    train = in_form(
        load_split(run.dataset, run.dataset_config, run.dataset_split), run.dataset, run.method, run.templates
    )
    if run.eval_dataset is not None or run.eval_split is not None:
        name = run.eval_dataset or run.dataset
        config = run.dataset_config if run.eval_dataset is None else None
        held_out = in_form(load_split(name, config, run.eval_split or "train"), name, run.method, run.templates)
        if held_out.column_names != train.column_names:
            raise ValueError(
                f"{name}: found the columns {held_out.column_names} in the rows held out; expected those of "
                f"{run.dataset}, {train.column_names}"
            )
        return Rows(train, held_out)
    count = min(_MOST_HELD_OUT, int(run.eval_share * len(train)))
    if count == 0:
        return Rows(train, None)
    parts = train.train_test_split(test_size=count, seed=seed)
    return Rows(parts["train"], parts["test"])


def load_split(name: str, config: str | None, split: str) -> Dataset:
    """The rows of a split of a data set of the hub, a directory or a file."""
    path = Path(name)
    try:
        if path.is_file():
            if not path.stat().st_size:
                raise ValueError("the file is empty")
            return datasets.load_dataset(_builder(path), data_files=str(path), split=split, **_how(path))
        if path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
            return _named(found, split) if isinstance(found, DatasetDict) else found
        if not path.exists() and (path.is_absolute() or name.startswith(".") or path.suffix in _BUILDERS):
            raise ValueError("there is no such file or directory")
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise ValueError(
            f"dataset {name!r}: {_reason(error)}; expected rows of the split {split!r} in a file of JSON Lines, CSV or "
            "Parquet, a directory of such files, or a data set of the hub"
        ) from error


def _builder(path: Path) -> str:
    if path.suffix not in _BUILDERS:
        raise ValueError(f"the file's name ends in {path.suffix!r}; known are {', '.join(_BUILDERS)}")
    return _BUILDERS[path.suffix]


def _how(path: Path) -> dict[str, Any]:
    return {"sep": "\t"} if path.suffix == ".tsv" else {}


def _named(found: DatasetDict, split: str) -> Dataset:
    if split not in found:
        raise ValueError(f"it has the splits {', '.join(found)}")
    return found[split]


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom: ``datasets`` wraps what it found in words of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def in_form(rows: Dataset, name: str, method: str, templates: Mapping[str, str] | None) -> Dataset:
    """The rows with the columns of a form, and nothing else."""
    if templates:
        rows = _filled(rows, name, templates)
    if len(rows) == 0:
        raise ValueError(f"dataset {name!r}: found no rows; expected at least one")
    form = next((form for form in FORMS[method] if set(form) <= set(rows.column_names)), None)
    if form is None:
        wanted = "; or ".join(" and ".join(form) for form in FORMS[method])
        raise ValueError(
            f"dataset {name!r}: found the columns {', '.join(rows.column_names)}; expected {wanted}. Make them "
            "of others: templates: {prompt: '{question}\\n', completion: '{answer}'}."
        )
    rows = rows.select_columns(list(form))
    for column in form:
        check = _is_turns if column == "messages" else _is_text_or_turns
        wrong = next((number for number, value in enumerate(rows[column]) if not check(value)), None)
        if wrong is not None:
            raise ValueError(
                f"dataset {name!r}, row {wrong}: found {column}={_short(rows[wrong][column])}; expected "
                f"{'turns' if column == 'messages' else 'a text, or turns'} [{{role, content}}, ...] that are not empty"
            )
    return rows


def _is_turns(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and turn.get("role") for turn in value)
    )


def _is_text_or_turns(value: Any) -> bool:
    return _is_turns(value) or (isinstance(value, str) and bool(value))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _filled(rows: Dataset, name: str, templates: Mapping[str, str]) -> Dataset:
    try:
        first = rows[0] if len(rows) else {}
        made = {column: template.format(**first) for column, template in templates.items()} if first else {}
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"templates: {type(error).__name__} {error}; expected names of columns of {name!r} in braces, found the "
            f"columns {', '.join(rows.column_names)}. A brace itself is written twice."
        ) from error
    fill = _filler(dict(templates))
    return rows.map(
        fill, remove_columns=[column for column in rows.column_names if column not in made], desc="Templates"
    )


def _filler(templates: dict[str, str]) -> Callable[[dict[str, Any]], dict[str, str]]:
    return lambda row: {column: template.format(**row) for column, template in templates.items()}


def is_turns(rows: Dataset) -> bool:
    """Whether the rows are turns of a conversation, in place of texts."""
    return isinstance(rows[0][rows.column_names[-1]], list)


def turn_by_turn(rows: Dataset) -> Dataset:
    """Conversations as a row for each thing that the assistant says: what came before as the prompt, and that."""

    def split(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = [
            (turns[:number], [turn])
            for turns in batch["messages"]
            for number, turn in enumerate(turns)
            if turn["role"] == "assistant" and number > 0
        ]
        return {"prompt": [before for before, _ in pairs], "completion": [said for _, said in pairs]}

    return rows.map(split, batched=True, remove_columns=rows.column_names, desc="Turn by turn")


def place_of(name: str) -> str:
    """A file or directory as an absolute path, a hub id as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name
