"""Gradient checkpointing of a transformers model, on and off.

What a layer computes is not kept for the backward but computed again from the layer's input.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

_lock = threading.Lock()
_trained: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""For each model that evaluates for a while how many asked for it, and what of it was in training."""


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
    """While this lasts, a model evaluates, in all threads; each of its modules has its own mode again after the last.

    In training a checkpointed layer takes no cache, of which ``generate`` knows nothing: it would go on from the last
    token alone.
    """
    with _lock:
        if model not in _trained:
            _trained[model] = [0, [module for module in model.modules() if module.training]]
            model.eval()
        _trained[model][0] += 1
    try:
        yield
    finally:
        with _lock:
            _trained[model][0] -= 1
            if not _trained[model][0]:
                for module in _trained.pop(model)[1]:
                    module.training = True


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Switch it off."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
