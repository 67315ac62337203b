"""A config of single options for a model: its task, the head that trains whole for it, and what cannot go together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from .config import QSVFTConfig

# By the end of a class's name. What PEFT's class for a task always hands on has to be known to the model's forward: a
# speech model takes no input_ids, and many a "ForConditionalGeneration" is a decoder that sees images.
_TASKS = {
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
_HANDED_ON = {TaskType.SEQ_2_SEQ_LM: ("input_ids", "decoder_input_ids")}
_OTHER_TASKS = {TaskType.SEQ_2_SEQ_LM: TaskType.CAUSAL_LM}
# What such a class has beside its body was drawn at random for the data at hand, or is as small.
_WITH_NEW_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "ForCTC")


def config_for(model: nn.Module, options: Mapping[str, Any]) -> QSVFTConfig:
    """A config of single options; task type and fresh head follow from the model's class."""
    options = dict(options)
    unknown = sorted(set(options) - set(QSVFTConfig.__dataclass_fields__))
    if unknown:
        allowed = sorted(set(QSVFTConfig.__dataclass_fields__) - {"peft_type", "auto_mapping", "peft_version", "base"})
        raise ValueError(f"prepare(): unknown option {unknown[0]!r}; expected one of {', '.join(allowed)}")
    if isinstance(model, PreTrainedModel):
        options.setdefault("task_type", task_of(type(model)))
        by_peft = _heads_of(options["task_type"])
        if more := [head for head in new_heads(model) if head not in by_peft]:
            options.setdefault("modules_to_save", more)
    return QSVFTConfig(**options)


def new_heads(model: PreTrainedModel) -> list[str]:
    """What a class for classification, question answering or CTC has beside its body, whatever it is called: a
    classifier, and what some have before it (a pooler, a projection)."""
    if not type(model).__name__.endswith(_WITH_NEW_HEADS):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix
        and not isinstance(child, PreTrainedModel)
        and any(True for _ in child.parameters())
    ]


def task_of(kind: type[nn.Module]) -> TaskType | None:
    """PEFT's task type for a class of models, None where PEFT has none whose arguments its forward takes."""
    task = next((task for ending, task in _TASKS.items() if kind.__name__.endswith(ending)), None)
    known = inspect.signature(kind.forward).parameters
    while task is not None and not set(_HANDED_ON.get(task, ("input_ids",))) <= set(known):
        task = _OTHER_TASKS.get(task)
    return task


def whole(config: QSVFTConfig) -> list[str]:
    """The modules that train whole, and are therefore not quantised."""
    return [*(config.modules_to_save or ()), *left_whole(config)]


def left_whole(config: QSVFTConfig) -> list[str]:
    """The heads that PEFT trains whole for a task, which are therefore not quantised."""
    return _heads_of(config.task_type)


def _heads_of(task: Any) -> list[str]:
    if task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return ["classifier", "score"]
    return ["qa_outputs"] if task == TaskType.QUESTION_ANS else []


def has_new_head(model: nn.Module, config: QSVFTConfig) -> bool:
    """Whether a head was drawn at random: one trains whole, and there is none over a vocabulary, which was learned."""
    getter = getattr(model, "get_output_embeddings", None)
    if getter is not None and getter() is not None:
        return False
    return any(one.endswith(name) for name in whole(config) for one, _ in model.named_modules())


def check_residual(config: QSVFTConfig, bits: int) -> None:
    """Refuse a residual base of other than 4 bits."""
    if config.residual and bits != 4:
        raise ValueError(
            f"prepare(): residual=True with bits={bits}; expected bits=4. The residual is what the singular directions "
            "leave of the weight, in NF4; a base of more bits needs none."
        )
