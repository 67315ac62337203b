"""GLUE: each task's figures, by scikit-learn and scipy (``pip install 'qsvft[paper]'``).

    CoLA                          Matthews' correlation
    STS-B                         Pearson's and Spearman's correlation (papers give one or both)
    MRPC, QQP                     accuracy, and F1 of class 1
    MNLI                          accuracy on the matched and on the mismatched set, each a set of its own
    SST-2, QNLI, RTE, WNLI        accuracy

All are parts of one, where papers multiply by 100. What is undefined is 0: a correlation of predictions that are all
the same, which a model that has diverged may give, and F1 where nothing is of class 1. References that are all the same
are refused for a correlation: they show nothing about any model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

Values = Sequence[float]


def accuracy(predictions: Values, references: Values) -> float:
    """The part of the predicted classes that are the references'."""
    _check_classes(predictions, references)
    return float(_library("sklearn.metrics").accuracy_score(references, predictions))


def f1(predictions: Values, references: Values) -> float:
    """F1 = 2 precision recall / (precision + recall) of class 1, of classes 0 and 1; 0 where neither side has it."""
    _check_classes(predictions, references)
    if others := {*predictions, *references} - {0, 1}:
        raise ValueError(f"F1: found the classes {sorted(others)}; expected 0 and 1 alone")
    return float(_library("sklearn.metrics").f1_score(references, predictions, zero_division=0))


def matthews(predictions: Values, references: Values) -> float:
    """Matthews' correlation of predicted classes with the references'; 0 where all predictions are the same."""
    _check_classes(predictions, references)
    _check_varied(references)
    return float(_library("sklearn.metrics").matthews_corrcoef(references, predictions))


def pearson(predictions: Values, references: Values) -> float:
    """Pearson's correlation of predicted numbers with the references'; 0 where all predictions are the same."""
    return _correlation("pearsonr", predictions, references)


def spearman(predictions: Values, references: Values) -> float:
    """Spearman's correlation, Pearson's of the ranks; 0 where all predictions are the same."""
    return _correlation("spearmanr", predictions, references)


GLUE: dict[str, dict[str, Callable[[Values, Values], float]]] = {
    "cola": {"matthews": matthews},
    "sst2": {"accuracy": accuracy},
    "mrpc": {"accuracy": accuracy, "f1": f1},
    "stsb": {"pearson": pearson, "spearman": spearman},
    "qqp": {"accuracy": accuracy, "f1": f1},
    "mnli_matched": {"accuracy": accuracy},
    "mnli_mismatched": {"accuracy": accuracy},
    "qnli": {"accuracy": accuracy},
    "rte": {"accuracy": accuracy},
    "wnli": {"accuracy": accuracy},
}
"""The figures of each task by their names."""


def figures(task: str, predictions: Values, references: Values) -> dict[str, float]:
    """The figures of a task's predictions, by their names.

    Args:
        task: a name of :data:`GLUE`.
        predictions: the predicted class of each row as a whole number, for STS-B the predicted similarity.
        references: the same of the data.

    Raises:
        ValueError: No such task, no rows, another number of predictions than of references, one that is not finite or,
            but for STS-B, not a class, or references that a correlation says nothing about.
    """
    if task not in GLUE:
        raise ValueError(f"found the task {task!r}; expected one of {', '.join(GLUE)}")
    try:
        return {name: figure(predictions, references) for name, figure in GLUE[task].items()}
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from error


def check_installed() -> None:
    """Refuse where scikit-learn or scipy is missing, before anything is trained.

    Raises:
        ImportError: saying what to install.
    """
    for name in ("sklearn.metrics", "scipy.stats"):
        _library(name)


def _correlation(name: str, predictions: Values, references: Values) -> float:
    _check_numbers(predictions, references)
    _check_varied(references)
    if len(set(predictions)) == 1:
        return 0.0
    return float(getattr(_library("scipy.stats"), name)(predictions, references).statistic)


def _check_numbers(predictions: Values, references: Values) -> None:
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"found {len(predictions)} predictions of {len(references)} references; expected as many, and at least one"
        )
    for name, values in (("predictions", predictions), ("references", references)):
        for row, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(f"found {value} in row {row} of the {name}; expected finite numbers")


def _check_classes(predictions: Values, references: Values) -> None:
    _check_numbers(predictions, references)
    for name, values in (("predictions", predictions), ("references", references)):
        for row, value in enumerate(values):
            if value != int(value):
                raise ValueError(f"found {value} in row {row} of the {name}; expected classes, which are whole numbers")


def _check_varied(references: Values) -> None:
    if len(set(references)) == 1:
        raise ValueError(
            f"all {len(references)} references are {references[0]}; a correlation needs two different ones"
        )


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            "GLUE's figures need scikit-learn and scipy: pip install 'qsvft[paper]'", name=name
        ) from error
