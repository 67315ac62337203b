"""Models without values: 4-bit layers and adapters on the meta device, for counting bytes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..storage.nf4 import empty_nf4_linear
from ..storage.quantization import partition_linears, set_flags


def model_without_values(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A causal language model on the meta device, frozen."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    except ValueError as error:
        raise ValueError(
            f"{type(config).__name__}: not a causal language model that transformers can build, so there is no loss "
            f"to train on ({str(error).splitlines()[0]})"
        ) from error
    return model.requires_grad_(False)


def nf4_on_meta(model: PreTrainedModel, skip_layers: Collection[str] = ()) -> PreTrainedModel:
    """Give the linears the shapes that ``qsvft.quantize(model, bits=4)`` gives them."""
    targets, skipped = partition_linears(model, [], skip_layers)
    for name in targets:
        model.set_submodule(name, empty_nf4_linear(model.get_submodule(name)))
    set_flags(model, 4, torch.bfloat16, skipped)
    return model


ATTENTION = "qsvft_ledger"


def _flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention with the memory of a flash kernel; on meta tensors SDPA would pick the one
    that materialises the whole attention matrix."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p=0.0, is_causal=True, scale=scaling
    )[0]
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make the attention above known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _flash_attention)


register_attention()
