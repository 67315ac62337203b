"""The front door: ``qsvft.prepare(model, bits=4)``."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .quantization import quantize
from .tuner.config import QSVFTConfig
from .tuner.model import progress_bars
from .tuner.targets import check_targets

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


def prepare(
    model: nn.Module,
    bits: int = 4,
    *,
    config: QSVFTConfig | None = None,
    adapter_name: str = "default",
    gradient_checkpointing: bool = True,
    progress: bool = True,
    **options: Any,
) -> PeftModel:
    """Make a model ready for fine-tuning: quantised base, frozen singular vectors, sparse fp32 M.

    Works in place, one matrix at a time: quantises the linear layers (all but the output head and
    embeddings), decomposes each target's weight as held, attaches M = 0, switches gradient
    checkpointing on (non-reentrant) and freezes the rest. With M = 0 the result computes exactly what
    the quantised base computes.

    Args:
        model: any transformers model or ``nn.Module`` in fp32, bf16 or fp16, or one that transformers
            loaded in 4 or 8 bits.
        bits: 4 (NF4 with double quantisation), 8 (int8) or 16 (base left as it is).
        config: a whole :class:`QSVFTConfig`; give either this or single options.
        adapter_name: name of the adapter.
        gradient_checkpointing: recompute activations in the backward where the model supports it.
        progress: show progress bars.
        **options: fields of :class:`QSVFTConfig`, such as rank=1024, pattern="plain", sides="both".
            Where ``task_type`` is not given it follows from the model's class, so that a fresh
            classification head is trained and saved with the adapter.

    Returns:
        A ``peft.PeftModel``, for Trainer, TRL, ``save_pretrained``, ``merge_and_unload``.

    Raises:
        ValueError: the model is prepared already, bits or an option out of range, a target that matches
            nothing, a rank over a layer's limit, NaN or Inf in a weight, a meta-device model.
    """
    if config is not None and options:
        raise ValueError(f"prepare(): give either config or single options, got both: {sorted(options)}")
    _refuse_prepared(model)
    config = config if config is not None else _config(model, options)
    whole = _left_whole(config)
    check_targets(model, config, whole)  # before anything is changed
    quantize(model, bits, skip_modules=[*(config.modules_to_save or []), *whole], progress=progress)
    with progress_bars(progress):
        prepared = get_peft_model(model, config, adapter_name=adapter_name)
    assert isinstance(prepared, PeftModel)
    if gradient_checkpointing:
        enable_checkpointing(model)
    return prepared


def enable_checkpointing(model: nn.Module) -> None:
    """Switch non-reentrant gradient checkpointing on, if the model supports it."""
    if not (isinstance(model, PreTrainedModel) and model.supports_gradient_checkpointing):
        return
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _refuse_prepared(model: nn.Module) -> None:
    adapted = next((n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)), None)
    if isinstance(model, PeftModel) or adapted is not None:
        raise ValueError(
            f"{adapted or type(model).__name__}: the model carries adapters already; expected a model without any. Use "
            "model.add_adapter(name, QSVFTConfig(...)) for another adapter, or model.unload() to start again."
        )


def _config(model: nn.Module, options: dict[str, Any]) -> QSVFTConfig:
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


def _left_whole(config: QSVFTConfig) -> list[str]:
    """The heads that PEFT trains whole for a task, which are therefore not quantised."""
    if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return ["classifier", "score"]
    return ["qa_outputs"] if config.task_type == TaskType.QUESTION_ANS else []
