"""Which class of model an adapter is of, where it brings the head: a base is saved without one, or with another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import TaskType
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from ..storage.headers import read_shard
from .config import QSVFTConfig
from .peft_type import PREFIX
from .sources import weights_file
from .tasks import whole

_OF_TASK: dict[Any, Any] = {
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: AutoModelForQuestionAnswering,
}


@dataclass(frozen=True)
class Head:
    """What to load a base with.

    Attributes:
        kind: the class, None for that of the base's config.
        brought: modules that the base may lack.
        options: for its ``from_pretrained``.
    """

    kind: Any = None
    brought: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def head_of(adapter: QSVFTConfig, base: PretrainedConfig | None) -> Head:
    """The head that an adapter brings, from its config and the shapes in its file.

    Args:
        adapter: its config, as it was read.
        base: of the base; None where it cannot be read.
    """
    brought = tuple(whole(adapter))
    named = (adapter.auto_mapping or {}).get("base_model_class")  # by PEFT, of an adapter without a task
    kind = _OF_TASK.get(adapter.task_type, getattr(transformers, str(named), None) if brought else None)
    if kind is None:
        return Head(None, brought)
    outputs = _number_of_outputs(kind)
    if outputs is None or base is None:
        return Head(kind, brought)
    labels = _labels(adapter, brought, kind, base, outputs)
    other = labels is not None and labels != getattr(base, outputs, None)
    return Head(kind, brought, {outputs: labels} if other else {})


def _number_of_outputs(kind: Any) -> str | None:
    """What a config calls the number of a head's outputs."""
    if kind.__name__.endswith("ForCTC"):
        return "vocab_size"
    return "num_labels" if kind.__name__.endswith(("Classification", "QuestionAnswering")) else None


def _labels(
    adapter: QSVFTConfig, brought: tuple[str, ...], kind: Any, base: PretrainedConfig, outputs: str
) -> int | None:
    """How many outputs the head has, so that a model of this class has what it trains whole in the shapes of its file:
    one of these numbers of rows, of which there are several where a projection or a pooler comes before the last."""
    path = weights_file(*adapter.where_read) if adapter.where_read is not None else None
    if path is None:
        return None
    _, entries = read_shard(Path(path))
    shapes = {
        key.removeprefix(PREFIX): entry.shape
        for key, entry in entries.items()
        if len(entry.shape) == 2 and key.endswith(".weight") and any(f".{name}." in f".{key}" for name in brought)
    }
    rows = sorted({shape[0] for shape in shapes.values()})
    return next((one for one in rows if len(rows) == 1 or _fits(kind, base, {outputs: one}, shapes)), None)


def _fits(kind: Any, base: PretrainedConfig, option: dict[str, int], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a class of models has tensors of these shapes, with this option."""
    config = copy.deepcopy(base)
    for name, value in option.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind._from_config(config)
    return all(tuple(held.shape) == shapes[key] for key, held in model.state_dict().items() if key in shapes)
