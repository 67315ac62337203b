"""Which class of model an adapter is of, where it brings the head: a base is saved without one, or with another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    classifies = kind.__name__.endswith(("Classification", "QuestionAnswering"))
    labels = _labels(adapter, brought) if classifies else None
    other = labels is not None and labels != getattr(base, "num_labels", None)
    return Head(kind, brought, {"num_labels": labels} if other else {})


def for_base(adapter: QSVFTConfig, head: Head) -> QSVFTConfig:
    """An adapter's config with layers' names as a base of another class has them: without the model's own prefix."""
    names = adapter.target_modules
    if head.kind is None or names is None or isinstance(names, str):
        return adapter
    bare = {name.partition(".")[2] if name.count(".") > 1 else name for name in names}
    return replace(adapter, target_modules=bare)


def _labels(adapter: QSVFTConfig, brought: tuple[str, ...]) -> int | None:
    """How many outputs the head has: the fewest rows of what it trains whole."""
    path = weights_file(*adapter.where_read) if adapter.where_read is not None else None
    if path is None:
        return None
    _, entries = read_shard(Path(path))
    heads = [
        entry.shape[0]
        for key, entry in entries.items()
        if len(entry.shape) == 2 and key.endswith(".weight") and any(f".{name}." in f".{key}" for name in brought)
    ]
    return min(heads, default=None)
