"""A config of single options for a model: its task, the head that trains whole for it, and what cannot go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from .config import QSVFTConfig

_TASKS = {
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
# Task heads that PEFT has no task type for; a fresh head has to be trained whole.
_OTHER_HEADS = {"ForImageClassification": "classifier", "ForAudioClassification": "classifier"}


def config_for(model: nn.Module, options: Mapping[str, Any]) -> QSVFTConfig:
    """A config of single options; task type and fresh head follow from the model's class."""
    options = dict(options)
    unknown = sorted(set(options) - set(QSVFTConfig.__dataclass_fields__))
    if unknown:
        allowed = sorted(set(QSVFTConfig.__dataclass_fields__) - {"peft_type", "auto_mapping", "peft_version", "base"})
        raise ValueError(f"prepare(): unknown option {unknown[0]!r}; expected one of {', '.join(allowed)}")
    name = type(model).__name__
    if isinstance(model, PreTrainedModel):
        task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
        options.setdefault("task_type", task)
        head = next((head for ending, head in _OTHER_HEADS.items() if name.endswith(ending)), None)
        if head is not None and hasattr(model, head):
            options.setdefault("modules_to_save", [head])
    return QSVFTConfig(**options)


def whole(config: QSVFTConfig) -> list[str]:
    """The modules that train whole, and are therefore not quantised."""
    return [*(config.modules_to_save or ()), *left_whole(config)]


def left_whole(config: QSVFTConfig) -> list[str]:
    """The heads that PEFT trains whole for a task, which are therefore not quantised."""
    if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return ["classifier", "score"]
    return ["qa_outputs"] if config.task_type == TaskType.QUESTION_ANS else []


def check_residual(config: QSVFTConfig, bits: int) -> None:
    """Refuse a residual base of other than 4 bits."""
    if config.residual and bits != 4:
        raise ValueError(
            f"prepare(): residual=True with bits={bits}; expected bits=4. The residual is what the singular directions "
            "leave of the weight, in NF4; a base of more bits needs none."
        )
