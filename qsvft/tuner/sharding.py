"""What FSDP and ZeRO-3 split between cards: the packed base and the factors, as frozen parameters of one dtype."""

from __future__ import annotations

from typing import Any, TypeVar

import bitsandbytes as bnb
import torch
from torch import nn

from .adapted import AdaptedLinear

Model = TypeVar("Model", bound=nn.Module)


def make_shardable(model: Model) -> Model:
    """Let FSDP and DeepSpeed's ZeRO-3 split a model's 4-bit base and its factors between the cards, in place.

    Both split floating parameters alone, and FSDP1 only those of one dtype together. The bytes of the packed weights
    and of U and V are therefore held as frozen parameters in the dtype of the model's other frozen weights, such as
    bf16 (what ``bnb_4bit_quant_storage`` does); no value changes. M stays fp32, in a module of its own that PEFT's
    policy wraps by itself. Without FSDP or ZeRO-3 the model computes the same.

    Args:
        model: as ``qsvft.from_pretrained`` and ``qsvft.prepare`` give it.

    Returns:
        The same model.

    Raises:
        ValueError: its other frozen weights have more than one dtype, or a layer holds its weight in int8.
    """
    dtype = _common_dtype(model)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            raise ValueError(
                f"make_shardable(): {name} holds its weight in int8, which neither FSDP nor ZeRO-3 can split; expected "
                "NF4 or 16 bits. Load the model with bits=4 or 16, or train with DDP, ZeRO-1 or ZeRO-2."
            )
        if isinstance(module, bnb.nn.Linear4bit):
            _store_as(module, dtype)
        elif isinstance(module, AdaptedLinear):
            for basis in module.held_bases().values():
                basis.stored.be_sharded(dtype)
    return model


def _common_dtype(model: nn.Module) -> torch.dtype:
    """Of the frozen weights that are held as they are."""
    found: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or isinstance(parameter, bnb.nn.Params4bit)) and parameter.is_floating_point():
            found.setdefault(parameter.dtype, name)
    if len(found) != 1:
        raise ValueError(
            "make_shardable(): expected the frozen weights that are not quantised in one dtype, found "
            f"{', '.join(f'{dtype} ({name})' for dtype, name in found.items()) or 'none'}. Load the model with dtype=, "
            "as torch.bfloat16."
        )
    return next(iter(found))


def _store_as(layer: Any, dtype: torch.dtype) -> None:
    """The packed bytes of a 4-bit layer in a tensor of another dtype."""
    old = layer.weight
    layer.weight = bnb.nn.Params4bit(
        old.data.view(-1).view(dtype).view(-1, 1),
        requires_grad=False,
        quant_state=old.quant_state,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=dtype,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state, layer.quant_storage = old.quant_state, dtype
