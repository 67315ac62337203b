"""A new adapter that is the weighted sum of others: exact where they agree on the map, for M enters it linearly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import QSVFTConfig
from .layer import QSVFTLinear


def check_sum(configs: Mapping[str, Any], adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Refuse a sum that cannot be made, before anything is.

    Raises:
        ValueError: no adapters, other numbers of weights, names that are unknown or taken, modules trained whole.
    """
    if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"add_weighted_adapter(): found {len(adapters)} adapters and the weights {list(weights)}; expected at "
            "least one adapter, and a finite weight for each."
        )
    if unknown := sorted(set(adapters) - set(configs)):
        raise ValueError(f"add_weighted_adapter(): found {unknown}; expected some of {sorted(configs)}.")
    if name in configs:
        raise ValueError(
            f"add_weighted_adapter(): there is an adapter '{name}' already; expected another adapter_name."
        )
    for adapter in adapters:
        config = configs[adapter]
        if not isinstance(config, QSVFTConfig) or config.modules_to_save:
            found = f"modules_to_save={config.modules_to_save}"
            raise ValueError(
                f"add_weighted_adapter(): adapter '{adapter}' has {found}, which cannot be added up; expected none."
            )


def check_alike(model: nn.Module, adapters: Sequence[str]) -> None:
    """Refuse adapters that are not between the same directions, on the same entries of M, in each layer.

    Raises:
        ValueError: naming the layer and what differs.
    """
    for layer in _layers(model):
        has = [adapter for adapter in adapters if adapter in layer.qsvft_M]
        if not has:
            continue
        what = {adapter: "none" if adapter not in has else _map(layer, adapter) for adapter in adapters}
        if len(set(what.values())) > 1:
            raise ValueError(
                f"{layer.module_name}: the adapters {list(adapters)} are not the same map there: "
                f"{'; '.join(f'{adapter}: {said}' for adapter, said in what.items())}. Expected the same directions "
                "and pattern: only then is the sum of the changes one of such a kind. Merge the model in place of that."
            )


@torch.no_grad()
def add_up(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """M = sum of w_i alpha_i / alpha M_i in each layer, in fp64."""
    for layer in _layers(model):
        if name in layer.qsvft_M:
            parts = [w * layer.units[a] * layer.M(a).double() for a, w in zip(adapters, weights, strict=True)]
            layer.M(name).data = (sum(parts[1:], parts[0]) / layer.units[name]).float()


def _map(layer: QSVFTLinear, adapter: str) -> str:
    """In words all that an adapter is there but M and alpha."""
    form, pattern = layer.forms[adapter], layer.pattern(adapter)
    one_sided = form.kind != "both"
    entries = f"{layer.settings[adapter].pattern} of rank {pattern.rank}, entries {pattern.digest()[:8]}"
    scale = f", 1/s {float((layer.qsvft_scale[adapter] / layer.units[adapter]).norm()):.4g}" if one_sided else ""
    return f"{form.kind} {', '.join(form.keys)}, {entries}{scale}"


def _layers(model: nn.Module) -> list[QSVFTLinear]:
    return [module for module in model.modules() if isinstance(module, QSVFTLinear)]
