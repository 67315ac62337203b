"""A model with a fresh head that gives a class, or a number, for each sentence or image: transformers' Trainer."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from .experiment import Data, Experiment
from .rows import read_rows
from .scores.glue import accuracy, check_installed
from .scores.glue import figures as glue_figures
from .ways import Batches, is_head

ACCURACY = "accuracy"
HEAD_RATE = "head_learning_rate"
OUR_OWN = ("max_length", HEAD_RATE)
"""What stands among the trainer's arguments and is none of transformers'."""

REGRESSION = "stsb"
"""The score whose labels are numbers and no classes."""


class Labelled(ABC):
    """What sentences and images share.

    Args:
        experiment: model, data, arguments.
        batch_size: of rows asked at once.
    """

    task_type: str | None = None
    auto: Any

    def __init__(self, experiment: Experiment, batch_size: int) -> None:
        self.experiment, self.batch_size = experiment, batch_size

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""
        return any(asked.score == REGRESSION for asked in self.experiment.asked.values())

    @cached_property
    def _train(self) -> Dataset:
        return read_rows(self.experiment.train, "train", column_of(self.experiment.train, "label"))

    @cached_property
    def classes(self) -> list[Any]:
        """The labels that there are, in the data set's order."""
        column = column_of(self.experiment.train, "label")
        feature = self._train.features[column]
        return list(range(feature.num_classes)) if isinstance(feature, ClassLabel) else sorted(set(self._train[column]))

    @cached_property
    def rows(self) -> Dataset:
        """What is trained on."""
        return self.read(self._train, self.experiment.train)

    @cached_property
    def asked(self) -> dict[str, Dataset]:
        """What is asked, by name."""
        return {
            name: self.read(self._rows_of(name), self._with_columns(self.experiment.asked[name]))
            for name in self.experiment.asked
        }

    def _rows_of(self, name: str) -> Dataset:
        data = self.experiment.asked[name]
        return read_rows(data, f"asked: {name}", column_of(self._with_columns(data), "label"))

    def _with_columns(self, data: Data) -> Data:
        """The columns of the rows trained on, where none are named."""
        return data if data.columns else self.experiment.train

    @abstractmethod
    def read(self, rows: Dataset, data: Data) -> Dataset:
        """Rows as the model takes them, with ``labels``."""

    def label(self, value: Any) -> Any:
        """A label as the model takes it.

        Raises:
            ValueError: nothing that was trained on has it.
        """
        if self.regression:
            return float(value)
        if value not in self.classes:
            raise ValueError(f"asked: found the label {value!r}; expected one of those trained on, {self.classes[:10]}")
        return self.classes.index(value)

    def load(self, dtype: str | None, folder: Path | None = None) -> nn.Module:
        """The base with a fresh head, or what was saved whole in a folder."""
        if folder is not None:
            return self.auto.from_pretrained(str(folder), dtype=dtype or "auto")
        return self.auto.from_pretrained(self.experiment.model, dtype=dtype or "auto", **self._head())

    def _head(self) -> dict[str, Any]:
        kind = {"problem_type": "regression"} if self.regression else {}
        return {"num_labels": 1 if self.regression else len(self.classes), "ignore_mismatched_sizes": True, **kind}

    def without_values(self, config: Any) -> nn.Module:
        """Its shape, with a head of two classes; which loss it has is said, since some look at the labels for it."""
        config = copy.deepcopy(config)
        config.problem_type = "single_label_classification"
        with torch.device("meta"):
            return self.auto.from_config(config, dtype=torch.bfloat16).requires_grad_(False)

    def batches(self, arguments: Any, count: int) -> Batches:
        """The first of the data, for a calibration."""
        size = arguments.per_device_train_batch_size
        rows = [self.rows[number] for number in range(min(size * count, len(self.rows)))]
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows as a batch."""

    def arguments(self, given: Mapping[str, Any], folder: Path) -> Any:
        """The trainer's arguments.

        Raises:
            ImportError: nothing is installed by which its answers could be judged.
            ValueError: an argument that the trainer does not have, or refuses.
        """
        check_installed()
        defaults = {
            "warmup_steps": 0.1,
            "save_steps": 0.1,
            "save_total_limit": 1,
            "logging_steps": 1,
            "report_to": "none",
        }
        cuda = torch.cuda.is_available()
        here = {"use_cpu": not cuda, "bf16": cuda, "dataloader_pin_memory": cuda, "remove_unused_columns": False}
        fields = {**defaults, **here, **{name: value for name, value in given.items() if name not in OUR_OWN}}
        try:
            return TrainingArguments(output_dir=str(folder), **fields)
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(f"training: {' '.join(str(error).split())}") from error

    def trainer(self, model: nn.Module, arguments: Any, given: Mapping[str, Any]) -> Trainer:
        """transformers' own; the head has its own learning rate where one is given."""
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=self.rows,
            data_collator=self.collate,
            optimizers=(_optimizer(model, arguments, given.get(HEAD_RATE)), None),
        )

    @torch.no_grad()
    def ask(self, model: nn.Module, name: str, folder: Path) -> dict[str, float]:
        """The scores of the task."""
        rows, device = self.asked[name], next(model.parameters()).device
        found, wanted = [], []
        for start in range(0, len(rows), self.batch_size):
            batch = self.collate([rows[number] for number in range(start, min(start + self.batch_size, len(rows)))])
            wanted.append(batch.pop("labels"))
            logits = model(**{key: value.to(device) for key, value in batch.items()}).logits.float().cpu()
            found.append(logits.squeeze(1) if self.regression else logits.argmax(1))
        said, right, score = torch.cat(found).tolist(), torch.cat(wanted).tolist(), self.experiment.asked[name].score
        figures = {ACCURACY: accuracy(said, right)} if score == ACCURACY else glue_figures(score, said, right)
        return {figure: 100 * value for figure, value in figures.items()}


def _optimizer(model: nn.Module, arguments: Any, head_rate: float | None) -> torch.optim.Optimizer:
    fresh, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fresh if is_head(name) else others).append(parameter)
    rates = ((others, arguments.learning_rate), (fresh, head_rate or arguments.learning_rate))
    groups = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
    return torch.optim.AdamW(groups, weight_decay=arguments.weight_decay)


def column_of(data: Data, what: str) -> Any:
    """The column of a role.

    Raises:
        ValueError: none is named.
    """
    found = (data.columns or {}).get(what)
    if not found:
        raise ValueError(f"columns: found no {what}; expected the name of a column for it")
    return found
