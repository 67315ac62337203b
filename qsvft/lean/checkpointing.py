"""Gradient checkpointing of a transformers model, on and off.

What a layer computes is not kept for the backward but computed again from the layer's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While this lasts, a model evaluates; each of its modules has its own mode again afterwards.

    In training a checkpointed layer takes no cache, of which ``generate`` knows nothing: it would go on from the last
    token alone.
    """
    trained = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in trained:
            module.training = True


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Switch it off."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
