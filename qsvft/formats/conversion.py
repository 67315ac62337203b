"""``convert_to_lora`` and ``save_as_lora`` for a model in memory, as PEFT has them, without an SVD.

PEFT's own take every dW (m, n) apart again: its conversion asks a layer for dW alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from ..maths.low_rank import Spectrum
from ..storage.experts import expert_layers
from ..storage.weights import HeldLinear
from ..storage.whole_folders import whole_folder
from ..tuner.layer import QSVFTLinear
from ..tuner.model import named_layers
from ..tuner.one_by_one import is_whole
from .exported import write_card
from .lora import PREFIX, LoraFit, fit_lora, lora_config, lora_tensors, write_lora


def convert_to_lora(
    model: nn.Module,
    rank: float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    *,
    onto: str = "held",
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """As PEFT's ``convert_to_lora``, from the factors that the adapter has in place of an SVD of every dW.

    Args:
        model: with adapters, in memory.
        rank: of all layers; a number of at most 1 is the part of a layer's |dW|_F^2 that is kept, by the least rank
            that does; None keeps all of it.
        adapter_name: which adapter.
        progressbar: show one.
        onto: see :func:`qsvft.export`.

    Returns:
        The config, and the tensors in fp32, by the names that PEFT's file has.

    Raises:
        TypeError: the model has no such adapter of qsvft's.
        ValueError: rank is no whole number above 0 and no part of 1; M holds NaN or Inf.
    """
    _, config, tensors = _converted(model, rank, adapter_name, progressbar, onto)
    return config, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    *,
    onto: str = "held",
) -> None:
    """As PEFT's ``save_as_lora``, see :func:`convert_to_lora`; the directory's card says how far off it is."""
    fit, config, tensors = _converted(model, rank, adapter_name, progressbar, onto)
    held: Any = model
    with whole_folder(Path(path)) as staging:
        write_lora(staging, tensors, config)
        found = fit.found(Path(path), max(config.r, *fit.ranks.values()), onto, torch.float32)
        write_card(staging, found, held.peft_config[adapter_name])


def _converted(
    model: nn.Module, rank: float | None, adapter: str, progress: bool, onto: str
) -> tuple[LoraFit, LoraConfig, dict[str, Tensor]]:
    whole = rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0)
    if not whole and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            f"convert_to_lora(): rank: expected a whole number above 0, a part above 0 and at most 1, or None, got "
            f"{rank!r}"
        )
    layers = named_layers(model, adapter)
    if not layers:
        raise TypeError(
            f"{type(model).__name__}: found no layer with an SVFT adapter named {adapter!r}; expected a model of "
            "get_peft_model() or qsvft.prepare(). Give its name: adapter_name=."
        )
    config = layers[0][1].settings[adapter]
    prefix = PREFIX if layers[0][0].startswith(PREFIX) else ""

    def rule(_: str, k: int, found: Spectrum) -> int:
        if rank is None:
            return k
        return min(k, rank) if isinstance(rank, int) else found.least(rank)

    shown: Sequence[Any] = tqdm(layers, desc="converting", unit="layer", disable=not progress)
    named = ((name.removeprefix(prefix), layer) for name, layer in shown)
    fit = fit_lora(named, adapter, rule, torch.float32, onto == "held")
    common = (fit.most if rank is None else rank) if not isinstance(rank, float) else None
    linear = {
        name: isinstance(module.get_base_layer() if isinstance(module, QSVFTLinear) else module, Conv1D)
        for name, module in _without_adapters(model, prefix).items()
        if isinstance(module, (nn.Linear, Conv1D, HeldLinear, QSVFTLinear))
    }
    experts = {name.removeprefix(prefix): one.removeprefix(prefix) for name, one in expert_layers(model).items()}
    tensors = {f"{prefix}{key}": tensor for key, tensor in lora_tensors(fit, common, experts).items()}
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    beside = {key: tensor for key, tensor in saved.items() if is_whole(key, config)}
    return fit, lora_config(config, fit, common, linear, experts), {**beside, **tensors}


def _without_adapters(model: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The modules of a model by the names that they have without adapters, what an adapted layer is made of left out.

    Args:
        model: with adapters.
        prefix: of all their names.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, QSVFTLinear):
            inside = (*inside, f"{name}.")
        found[name.removeprefix(prefix)] = module
    return found
