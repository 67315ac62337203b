"""The options of ``qsvft train`` that are neither an adapter's nor a trainer's: what is trained, on what, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .choices import BASE_BITS
from .option import INTEGER, NUMBER, SWITCH, TABLE, WORD, Kind, Option, declared, is_integer, is_number, one_of, option

TRAINING_METHODS = ("sft", "dpo")
"""What a trainer of TRL's there is for."""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_text_or_none(value: object) -> bool:
    return value is None or _is_text(value)


def _is_table_of_texts(value: object) -> bool:
    return value is None or (
        isinstance(value, Mapping) and all(_is_text(name) and _is_text(text) for name, text in value.items())
    )


def _theirs(kind: Kind, help: str) -> Any:
    """An option that TRL's trainer checks."""
    return option(None, kind, help, "what the trainer takes", lambda value: True)


@dataclass(frozen=True)
class RunOptions:
    """What ``qsvft train`` takes beside the options of an adapter, the switches and the arguments of TRL's trainer."""

    model: str | None = option(
        None, WORD, "The base: a directory or a hub id.", "a directory or a hub id", _is_text_or_none
    )
    dataset: str | None = option(
        None, WORD, "The rows to train on: a hub id, a directory, or a file of JSON Lines, CSV or Parquet.",
        "a hub id, a directory or a file", _is_text_or_none,
    )  # fmt: skip
    output: str | None = option(
        None, WORD, "The directory to make: adapter, checkpoints, losses. A run begun there goes on.", "a directory",
        _is_text_or_none,
    )  # fmt: skip
    method: str = option("sft", WORD, "Supervised, or on preferences.", *one_of(TRAINING_METHODS))
    dataset_config: str | None = option(None, WORD, "Of a data set of the hub.", "a name, or None", _is_text_or_none)
    dataset_split: str = option(
        "train", WORD, "The rows to take.", "a split, such as 'train' or 'train[:1%]'", _is_text
    )
    eval_dataset: str | None = option(
        None, WORD, "The rows held out; None takes some from the others.", "as dataset, or None", _is_text_or_none
    )
    eval_split: str | None = option(
        None, WORD, "The rows held out, as a split; of the same data set where eval_dataset is None.",
        "a split, or None", _is_text_or_none,
    )  # fmt: skip
    eval_share: float = option(
        0.02, NUMBER, "The share of rows held out where none are given, of at most 256; 0 for none.",
        "a number from 0 to 0.5", lambda value: is_number(value) and 0 <= value <= 0.5,
    )  # fmt: skip
    templates: dict[str, str] | None = option(
        None, TABLE, "Columns made of others: {prompt: 'Q: {question}\\nA:', completion: ' {answer}'}.",
        "a table of columns to texts with names of columns in braces, or None", _is_table_of_texts,
    )  # fmt: skip
    revision: str | None = option(None, WORD, "Of the base on the hub.", "a revision, or None", _is_text_or_none)
    bits: int = option(4, INTEGER, "How the base is held: 4 (NF4), 8 (int8) or 16.", *one_of(BASE_BITS))
    dtype: str | None = option(
        None, WORD, "Of the base before it is quantised; None for bfloat16 in place of float32.",
        "'bfloat16', 'float16', 'float32' or None",
        lambda value: value in (None, "bfloat16", "float16", "float32"),
    )  # fmt: skip
    fit: str | None = option(
        None, WORD, "Choose what is not given for a card of this size, such as 8GiB.", "a size, or None",
        lambda value: value is None or _is_text(value) or is_number(value),
    )  # fmt: skip
    calibration: int = option(
        16, INTEGER, "Batches of the data that U and V come from; 0 for singular vectors.",
        "an integer of at least 0", lambda value: is_integer(value, 0),
    )  # fmt: skip
    adapter: str | None = option(
        None, WORD, "A trained adapter to go on with, in place of a new one.", "a directory or a hub id, or None",
        _is_text_or_none,
    )  # fmt: skip
    cache_dir: str | None = option(
        None, WORD, "Where prepared bases are kept; None for $QSVFT_CACHE or ~/.cache/qsvft.", "a directory, or None",
        _is_text_or_none,
    )  # fmt: skip
    stop_at_nan: bool = option(
        True, SWITCH, "End at the step that gives NaN, and keep the adapter as it was.", "True or False",
        lambda value: isinstance(value, bool),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, one in RUN_OPTIONS.items():
            one.refuse(getattr(self, name))


@dataclass(frozen=True)
class OftenGiven:
    """Arguments of TRL's trainers with a place of their own on the command line; the others go by ``--set``."""

    num_train_epochs: float | None = _theirs(NUMBER, "Times through the data; 1.")
    max_steps: int | None = _theirs(INTEGER, "Steps of the optimizer, in place of epochs.")
    learning_rate: float | None = _theirs(NUMBER, "The highest; left out, what suggest_learning_rate() gives.")
    per_device_train_batch_size: int | None = _theirs(INTEGER, "Sequences at once on a card; 1.")
    gradient_accumulation_steps: int | None = _theirs(INTEGER, "So many of which make a step; 8.")
    max_length: int | None = _theirs(INTEGER, "Tokens of a sequence, at most; 1024.")
    packing: bool | None = _theirs(SWITCH, "Several texts in one sequence (sft).")
    report_to: str | None = _theirs(WORD, "tensorboard, wandb or mlflow; none.")
    save_steps: float | None = _theirs(NUMBER, "A checkpoint after so many steps, or such a share of all; 0.1.")
    eval_steps: float | None = _theirs(NUMBER, "The same for the loss on the rows held out; 0.2.")


RUN_OPTIONS: dict[str, Option] = declared(RunOptions)
"""The same by name."""

OFTEN_GIVEN: dict[str, Option] = declared(OftenGiven)
