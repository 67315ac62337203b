"""One training step under the ledger: forward, loss, backward, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..lean.checkpointing import disable_checkpointing, enable_checkpointing
from .attention import autocast_on_meta, flash_attention
from .held import held_tensors
from .ledger import Ledger


def count_on(
    model: nn.Module,
    base: PreTrainedModel,
    head: nn.Module | None,
    batch_size: int,
    seq_len: int,
    gradient_checkpointing: bool,
    optimizer: str,
    record: bool = True,
    batch: Mapping[str, Tensor] | None = None,
) -> tuple[Ledger, int]:
    """Count one training step of a model that is built already, on meta or on real tensors.

    The step is of tokens that are their own labels, or of another ``batch`` that gives a loss.

    With ``record`` off the step runs as it is, for a device whose allocator is asked instead: the ledger
    takes bitsandbytes' products apart, which changes their bytes.
    """
    base.config.use_cache = False
    if gradient_checkpointing:
        enable_checkpointing(base)
    else:
        disable_checkpointing(base)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    stepper = make_optimizer(optimizer, trainable)
    if stepper is not None:
        _fill_state(stepper, trainable)
    device = next(model.parameters()).device
    if batch is None:
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device=device)
        batch = {"input_ids": tokens, "labels": tokens}
    ledger = Ledger()
    for tensor, category in held_tensors(model):
        ledger.register(tensor, category)
    if stepper is not None:
        for state in stepper.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    ledger.register(value, "optimizer")
    for tensor in batch.values():
        ledger.register(tensor, "temporaries")
    with ExitStack() as stack:
        if record:
            for context in (ledger, flash_attention(), autocast_on_meta()):
                stack.enter_context(context)
        stack.enter_context(ledger.watch(model, head))
        ledger.phase = "forward"
        output = model(**batch)
        loss = output.loss
        if loss is None:
            raise ValueError(f"{type(base).__name__} returns no loss for labels; expected a causal language model")
        del output
        ledger.phase = "backward"
        loss.backward()
        for parameter in trainable:
            if parameter.grad is not None:
                ledger.register(parameter.grad, "gradients")
        ledger.loss_region = False
        ledger.phase = "optimizer"
        if stepper is not None:
            stepper.step()
    return ledger, sum(p.numel() for p in trainable)


def make_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer by name, with ``foreach`` off, so that its temporaries are one parameter's."""
    if not parameters:
        return None
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, foreach=False)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=0.0)
    return torch.optim.AdamW(parameters, lr=0.0, foreach=False)


def _fill_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Step once on zero gradients, so that the counted step finds the optimizer's state there."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
