"""The door to the chunked loss: ``enable_chunked_loss(model)`` for causal language models of transformers.

    hidden -> head -> [/ c, tanh, * c] -> loss_function(logits, labels) -> loss
              \\___ DeferredLogits ___/    qsvft.lean.cross_entropy, 256 tokens at a time

While a training forward with labels runs, the head answers with
:class:`~qsvft.lean.deferred_logits.DeferredLogits`, which remember the hidden states and what the model does to
the logits, and the model's loss function takes their loss in chunks. Anyone else who looks at them (a
model that computes its loss in another way, a metric, a caller that reads ``outputs.logits``) gets the
true logits with their true graph. Evaluation and generation run the model's own forward.

The model's class is exchanged for a subclass of the same name, and not its ``forward`` attribute: PEFT
calls ``forward`` past all module hooks, and an attribute bound to the model would be a reference cycle.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft import PeftMixedModel, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from ..storage.disguise import disguised, undisguised
from .cross_entropy import Rows, chunked_cross_entropy
from .deferred_logits import DeferredLogits, HeadCall, true_logits
from .lent import lent

logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound=nn.Module)

_deferring_head: ContextVar[Any] = ContextVar("the head whose logits this forward defers", default=None)


def enable_chunked_loss(model: Model) -> Model:
    """Compute the training loss of a causal language model in chunks of 256 tokens, in place.

    The loss is the one that transformers computes, to rounding, for any batch, label shift, -100 labels
    and ``num_items_in_batch``; at its peak it holds 6 to 8 bytes for 256 x V logits instead of 12 for
    tokens x V. In training, ``label_smoothing=`` may be passed to the model beside ``labels``, as
    ``F.cross_entropy`` defines it. Trainer's ``label_smoothing_factor`` takes the labels away from the
    model and reads the logits: there nothing is chunked. Under ``torch.compile`` nothing is either.
    ``outputs.logits`` of a training forward are :class:`DeferredLogits`: computed if they are read, which
    has to be before the optimizer's step where the head is trained.

    Args:
        model: a transformers model whose loss is ``ForCausalLMLoss``, or a ``PeftModel`` around one. Doing
            it twice is doing it once.

    Returns:
        The same model.

    Raises:
        ValueError: the model's loss cannot be chunked; says why, see :func:`chunked_loss_obstacle`.
    """
    obstacle = chunked_loss_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"enable_chunked_loss(): {obstacle}")
    base = _base(model)
    if not _enabled(base):
        plain: Any = type(base)
        _become(base, _chunked_class(plain))
    return model


def disable_chunked_loss(model: Model) -> Model:
    """Take back :func:`enable_chunked_loss`, in place; a model without it is left as it is."""
    base = _base(model)
    if _enabled(base):
        _become(base, undisguised(base, _chunked_class))
    return model


def chunked_loss_obstacle(model: nn.Module) -> str | None:
    """Why :func:`enable_chunked_loss` refuses this model, or None if it does not."""
    base = _base(model)
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        return f"{name}: expected a transformers causal language model, or a PeftModel around one. Pass the bare model."
    if _enabled(base):
        return None
    if _own_forward(base) is not type(base).forward:
        return (
            f"{name}: found a forward put on the model itself, expected its class's. Call enable_chunked_loss() before "
            "whatever wraps the forward (a trainer, TRL, Liger)."
        )
    if base.get_output_embeddings() is None:
        return f"{name}: found no output head, expected a causal language model. Train it with its own loss."
    if not _calls_loss_function(type(base)) or "labels" not in inspect.signature(type(base).forward).parameters:
        return (
            f"{name}: its forward computes the loss itself, expected a call of self.loss_function. Train it as it is."
        )
    if base.loss_function is not ForCausalLMLoss:
        found = getattr(base.loss_function, "__name__", type(base.loss_function).__name__)
        return f"{name}: found the loss {found}, expected transformers' ForCausalLMLoss. Train it with its own loss."
    return None


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel | PeftMixedModel) else model


def _calls_loss_function(cls: type) -> bool:
    forwards = [inspect.unwrap(parent.__dict__["forward"]) for parent in cls.__mro__ if "forward" in vars(parent)]
    return any("loss_function" in forward.__code__.co_names for forward in forwards if hasattr(forward, "__code__"))


def _enabled(base: nn.Module) -> bool:
    return undisguised(base, _chunked_class) is not None


def _become(base: nn.Module, cls: type) -> None:
    old = type(base)
    # accelerate's device hooks keep the bound forward that they wrap.
    kept = vars(base).get("_old_forward")
    if getattr(kept, "__func__", None) is old.forward:
        vars(base)["_old_forward"] = MethodType(cls.forward, base)  # type: ignore[attr-defined]
    base.__class__ = cls


@functools.cache
def _chunked_class(plain: Any) -> type:
    """The subclass of a model's class whose training forward defers the logits; to all others it is that class."""
    forward = plain.forward
    position = list(inspect.signature(forward).parameters).index("labels") - 1

    @functools.wraps(forward)
    def chunked_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels", args[position] if len(args) > position else None)
        if torch.compiler.is_compiling() or not _may_defer(self, labels):
            return forward(self, *args, **kwargs)
        with _deferring(self):
            return forward(self, *args, **kwargs)

    return disguised(plain, _chunked_class, chunked_forward)


def _may_defer(model: Any, labels: Any) -> bool:
    if not (_enabled(model) and model.training and torch.is_grad_enabled()):
        return False
    if labels is None:
        logger.info_once(
            f"{type(model).__name__} is trained without labels, so whoever computes the loss gets whole logits and not "
            "the chunked loss. With Trainer's label_smoothing_factor that is so; pass label_smoothing= to the model."
        )
        return False
    head = model.get_output_embeddings()
    # Replicas of nn.DataParallel gather whole logits; a sharded head is whole only while its own forward runs.
    sharded = head is None or any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in head.parameters())
    return not sharded and not hasattr(model, "_is_replica") and model.loss_function is ForCausalLMLoss


@contextmanager
def _deferring(model: Any) -> Iterator[None]:
    """Let the head answer with deferred logits, and the loss function take them.

    The head's hooks run as always and see the true hidden states: only what its forward does is replaced.
    """
    head = model.get_output_embeddings()

    def make_deferred() -> Any:
        forward, linear = head.forward, _linear(head)

        def deferred(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if len(args) == 1 and not kwargs else None
            mine = _deferring_head.get() is head  # and no forward of another thread
            if mine and isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.dim() > 1:
                return DeferredLogits(HeadCall(hidden, head, forward, linear))
            return forward(*args, **kwargs)

        return deferred

    # The loss function takes whole logits as well.
    with lent(head, "forward", make_deferred), lent(model, "_loss_function", lambda: _loss):
        token = _deferring_head.set(head)
        try:
            yield
        finally:
            _deferring_head.reset(token)


def _loss(
    logits: Any,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, in chunks where the logits are deferred, and with label smoothing."""
    chunked = isinstance(logits, DeferredLogits) and logits.fits(vocab_size)
    if not chunked:
        logits = true_logits(logits)
        if not label_smoothing:
            return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, head, bias, steps = logits.parts() if chunked else (logits.reshape(-1, vocab_size), nn.Identity(), None, ())
    loss = chunked_cross_entropy(
        hidden,
        head,
        shift_labels.reshape(-1).to(hidden.device),
        bias=bias,
        steps=steps,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def _linear(head: nn.Module) -> tuple[Tensor | Rows, Tensor | None] | None:
    """Weight and bias, if calling the head comes to x Wᵀ + b and nothing else."""
    if isinstance(head, ModulesToSaveWrapper) and "forward" not in vars(head):
        copies = head.modules_to_save
        active = None if head.disable_adapters else next((a for a in head.active_adapters if a in copies), None)
        head = head.original_module if active is None else copies[active]
    forward = _own_forward(head)
    if forward is nn.Linear.forward:
        return head.weight, head.bias  # type: ignore[return-value]
    # Other wrappers of PEFT lend the attributes of what they wrap.
    stored = None if isinstance(head, AuxiliaryTrainingWrapper) else getattr(head, "stored", None)
    if isinstance(stored, Rows) and forward is type(head).forward:
        return stored, getattr(head, "bias", None)
    return None


def _own_forward(module: nn.Module) -> Any:
    """The function behind ``module.forward``, seen through accelerate's device hooks."""
    forward = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward", type(module).forward)
    return getattr(forward, "__func__", forward)
