"""``StopAtNaN``: training ends at the step whose loss or gradient is not finite, says where from, and keeps M."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .adapted import AdaptedLinear

FOLDER = "before-nan"


class StopAtNaN(TrainerCallback):
    """A callback for transformers' and TRL's trainers: ``Trainer(..., callbacks=[qsvft.StopAtNaN()])``.

    Without it a NaN loss makes every M NaN in one step, and the log shows 0. Before each step of the optimizer the
    losses and the norm of the gradient are looked at; where one is not finite, the adapter as it is, before the step,
    is saved to ``output_dir/before-nan``, the batches of the step run once more to find the first module that gave NaN
    or Inf, and the training ends. With fp16 and a gradient scaler nothing is done: that passes over such steps by
    itself.

    Raises:
        FloatingPointError: from the training, naming the step, the module and where the adapter is.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._losses: list[Tensor] = []
        self._hooks = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to remember the batches of a step."""
        self.on_train_end(args, state, control)
        model = kwargs["model"]
        self._hooks.callback(model.register_forward_pre_hook(self._remember, with_kwargs=True).remove)
        self._hooks.callback(model.register_forward_hook(self._remember_loss).remove)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget them."""
        self._forget()
        self._hooks.close()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the losses and the gradient."""
        model = kwargs["model"]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # One number for all, so that the card is waited for once.
        norms = [*self._losses, *([torch.nn.utils.get_total_norm(gradients)] if gradients else [])]
        alike = [norm.to(norms[0].device, torch.float32) for norm in norms]
        if args.fp16 or not norms or bool(torch.isfinite(torch.stack(alike).sum())):
            self._forget()
            return
        what = "the loss" if not all(bool(torch.isfinite(loss)) for loss in self._losses) else "the gradient"
        folder = Path(str(args.output_dir)) / FOLDER
        if state.is_world_process_zero:
            model.save_pretrained(folder)
        batches = list(self._batches)
        self.on_train_end(args, state, control)
        raise FloatingPointError(
            f"step {state.global_step + 1}: {what} is NaN or Inf; expected finite numbers. {_origin(model, batches)} "
            f"The adapter as it was before this step is in {folder}. Look at the data of this step, or train on "
            "from there with a lower learning rate, a longer warm-up or gradient clipping."
        )

    def _forget(self) -> None:
        self._batches.clear()
        self._losses.clear()

    def _remember_loss(self, module: nn.Module, _: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if module.training and isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().reshape(()))

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._batches.append((args, kwargs))


@torch.no_grad()
def _origin(model: nn.Module, batches: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> str:
    """Where the first number that is not finite comes from, in a sentence."""
    for args, kwargs in batches:
        found: list[str] = []
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                handle = module.register_forward_hook(partial(_note, found, name))
                hooks.callback(handle.remove)
            model(*args, **kwargs)
        inner = [name for name in found if name]
        if inner:
            layer = model.get_submodule(inner[0])
            name = layer.module_name if isinstance(layer, AdaptedLinear) else inner[0]
            return f"In the forward the first module that gives some is {name}, a {type(layer).__name__}."
        if found:
            return "Every module gives finite numbers, but the loss is not finite: has the batch any labels?"
    return "The forward is finite, so they arise in the backward."


def _note(found: list[str], name: str, _: nn.Module, __: Any, output: Any) -> None:
    if not found and not all(bool(torch.isfinite(one).all()) for one in _tensors(output)):
        found.append(name)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from (tensor for one in output.values() for tensor in _tensors(one))
    elif isinstance(output, (tuple, list)):
        yield from (tensor for one in output for tensor in _tensors(one))
