"""A batch whose rows have adapters of their own: ``model(..., adapter_names=["a", "__base__", "b"])``.

As with LoRA: the base is computed once for all rows, each adapter on its rows. For inference alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .adapted import AdaptedLinear

BASE = "__base__"
_call: ContextVar[object] = ContextVar("the call whose rows have adapters of their own", default=None)
Rows = Tensor | None
"""The rows of a batch that an adapter is for; None for all of them."""


def rows_by_adapter(names: Sequence[str], x: Tensor) -> dict[str, Rows]:
    """The rows of each adapter that is named."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name != BASE:
            found.setdefault(name, []).append(row)
    return {name: torch.tensor(rows, device=x.device) for name, rows in found.items()}


def on_rows(rows: Rows, update: Callable[[Tensor, Tensor], Tensor], base: Tensor, x: Tensor) -> Tensor:
    """``update(base, x)`` in these rows, ``base`` in the others."""
    if rows is None:
        return update(base, x)
    return base.index_copy(0, rows, update(base[rows], x[rows]).to(base.dtype))


def check_rows(layer: AdaptedLinear, x: Tensor, names: Sequence[str]) -> None:
    """Refuse names that do not belong to the rows of x, or a layer that has adapters in its weight."""
    if layer.merged:
        raise ValueError(
            f"{layer.module_name}: Cannot pass `adapter_names` when there are merged adapters, please call "
            f"`unmerge_adapter` first. Found {', '.join(layer.merged_adapters)}, expected none."
        )
    if len(names) != len(x):
        raise ValueError(
            f"{layer.module_name}: Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} names and {len(x)} rows. Give one for each row of the batch."
        )


@contextmanager
def mixed_batch(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Let the layers of a model take ``adapter_names`` of these arguments of its forward, as long as this lasts.

    Raises:
        ValueError: the model is in training, or a name is of no adapter.
        TypeError: it is no list of strings.
    """
    if kwargs.get("alora_offsets") is not None:
        raise ValueError("alora_offsets=: found offsets; expected none: they are for aLoRA adapters alone.")
    names = kwargs.get("adapter_names")
    if names is None:
        yield
        return
    _check(model, names)
    beams = kwargs.get("num_beams") or 1
    get_encoder = getattr(model, "get_encoder", None) if beams > 1 else None
    encoder = get_encoder() if get_encoder is not None else None
    unrepeated = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()
    call, own = object(), _call.get()
    with ExitStack() as hooks:
        hooks.callback(_call.set, own)
        _call.set(call)
        for module in model.modules():
            if isinstance(module, (AdaptedLinear, AuxiliaryTrainingWrapper)):
                for_rows = names if module in unrepeated else [name for name in names for _ in range(beams)]
                handle = module.register_forward_pre_hook(partial(_hand_over, call, for_rows), with_kwargs=True)
                hooks.callback(handle.remove)
        yield


def _hand_over(
    call: object, names: Sequence[str], _: nn.Module, args: Any, kwargs: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]] | None:
    """Of a forward in this call; the hooks are seen by those of other threads as well, sometimes without their kind."""
    if kwargs is None or not (torch.compiler.is_compiling() or _call.get() is call):
        return None
    return args, {**kwargs, "adapter_names": names}


def _check(model: nn.Module, names: Any) -> None:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names=: found {names!r}; expected a list with the name of an adapter for each row.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() before.")
    known = {name for layer in model.modules() if isinstance(layer, AdaptedLinear) for name in layer.qsvft_M}
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Expected in adapter_names= some of "
            f"{sorted(known)}, or '{BASE}' for rows without an adapter."
        )
    adapted = (name for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear))
    if (expert := next((name for name in adapted if ".experts." in name), None)) is not None:
        raise ValueError(
            f"adapter_names=: {expert} sees rows of its own and not those of the batch, an expert's; expected adapters "
            "without target_parameters. Run the rows of each adapter by themselves (set_adapter)."
        )
    configs = getattr(model, "peft_config", {})  # of other methods as well, which may have no such option
    biased = [name for name, config in configs.items() if getattr(config, "bias", "none") != "none"]
    if biased:
        raise ValueError(
            f"adapter_names=: adapter '{biased[0]}' changed the base's biases (QSVFTConfig.bias), which every row has; "
            "expected adapters with bias='none'."
        )
