"""Gradient checkpointing of a transformers model, on and off.

What a layer computes is not kept for the backward but computed again from the layer's input.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def enable_checkpointing(model: nn.Module) -> None:
    """Switch non-reentrant gradient checkpointing on, if the model supports it."""
    if not (isinstance(model, PreTrainedModel) and model.supports_gradient_checkpointing):
        return
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Switch it off."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
