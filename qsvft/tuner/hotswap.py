"""``peft.utils.hotswap.hotswap_adapter`` of our adapters: another M takes the place of one, in the same tensors.

PEFT's function reads config and file, and asks a table what has to be the same; then it hands over here. Everything is
checked as in loading before the first number is written: what is refused leaves the adapter as it was. A compiled model
is not compiled again, for nothing but values changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import load_peft_weights
from peft.utils import hotswap
from torch import nn

from .adapter_file import AdapterReader
from .config import QSVFTConfig
from .model import describe_model, named_layers
from .peft_type import PREFIX, QSVFT

_SAME = (
    "rank",
    "rank_pattern",
    "pattern",
    "off_diagonals",
    "seed",
    "sides",
    "unit",
    "basis",
    "factor_bits",
    "residual",
)


def enable_hotswap() -> None:
    """Let PEFT's function take our adapters."""
    hotswap.CONFIG_KEYS_TO_CHECK[QSVFT] = [*_SAME, "modules_to_save", "trainable_token_indices", "bias"]
    hotswap.hotswap_adapter_from_state_dict = _with_ours(hotswap.hotswap_adapter_from_state_dict)


def _with_ours(swap: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: dict[str, Any], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if not isinstance(config, QSVFTConfig):
            return swap(model, state_dict, adapter_name, config, *args, **kwargs)
        _swap(getattr(model, "_orig_mod", model), adapter_name, config)

    return hotswap_adapter_from_state_dict


def _swap(model: nn.Module, adapter: str, config: QSVFTConfig) -> None:
    """Put the M of the adapter that a config was read with in the place of another.

    Raises:
        ValueError: it is merged, trains more than M, or is not the same map as the one in the model.
    """
    layers = named_layers(model, adapter)
    if not layers or config.where_read is None:
        raise ValueError(
            f"hotswap_adapter(): the model has no adapter '{adapter}' of QSVFT; expected the name of one that is "
            "loaded. Load the first one with load_adapter()."
        )
    if merged := next((layer.module_name for _, layer in layers if adapter in layer.merged_adapters), None):
        raise ValueError(
            f"{merged}: Cannot hot-swap adapter '{adapter}' because it is currently merged into the base weights; call "
            "unmerge_adapter() first."
        )
    if config.modules_to_save or config.trainable_token_indices is not None or config.bias != "none":
        raise ValueError(
            f"hotswap_adapter(): the adapter trains more than M (modules_to_save={config.modules_to_save}, "
            f"trainable_token_indices={config.trainable_token_indices}, bias={config.bias!r}), and only M is swapped. "
            "Load it beside the other, with load_adapter() and set_adapter()."
        )
    directory, subfolder, options = config.where_read
    tensors = load_peft_weights(directory, device="cpu", subfolder=subfolder, **options)
    reader = AdapterReader(tensors, config, describe_model(model))
    for name, layer in layers:
        reader.check_same_map(name.removeprefix(PREFIX), layer, adapter)
    reader.check(layers, adapter, model)
    with torch.no_grad():
        for name, layer in layers:
            layer.M(adapter).copy_(reader.coefficients(name.removeprefix(PREFIX)))
