"""Attention with the memory of a flash kernel, on meta and on the CPU, where torch would build the whole L x L matrix.

    softmax(q kᵀ scale) v       saved for the backward: q, k, v, the result, and a number a row

Most architectures ask transformers for a kernel by its name, and get this one. Those with classes of their own call
torch's ``scaled_dot_product_attention``, which is exchanged for it while a step is counted. Where they multiply the
matrices themselves (GPT-J), the whole matrix is what a card holds, and what is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

ATTENTION = "qsvft_ledger"
"""The name by which transformers knows it."""


def model_that_counts(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model on the default device, with this attention where its architecture takes a name.

    Raises:
        ValueError: transformers knows no causal language model of this config.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), PreTrainedModel)
    named = {"attn_implementation": ATTENTION} if kind._supports_attention_backend else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **named)
    return model


@contextmanager
def flash_attention() -> Iterator[None]:
    """Meanwhile torch's own attention takes the memory of a flash kernel, on meta and on the CPU."""
    own = functional.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **options: Any) -> Tensor:
        found: Tensor = (own if query.is_cuda else _flash)(query, *args, **options)
        return found

    # A torch function mode would not be there when a checkpointed layer runs again.
    with patch.object(functional, "scaled_dot_product_attention", attention):
        yield


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Meanwhile ``torch.autocast`` is a matter of no consequence on meta, where torch has none (PEFT turns it off)."""
    own = torch.autocast

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        return nullcontext() if device_type == "meta" else own(device_type, *args, **options)

    with patch.object(torch, "autocast", autocast):
        yield


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """(b, heads, L, keys' width), keys and values with as many heads or a whole part of them."""
    groups, left = divmod(query.shape[1], key.shape[1])
    if left or not groups:  # the kernel would end the process
        raise ValueError(
            f"found {query.shape[1]} heads of queries and {key.shape[1]} of keys; expected a whole number of "
            "the former for each of the latter. Correct num_key_value_heads in the config."
        )
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    width = value.shape[-1]
    if width < key.shape[-1]:  # the kernel knows one width; flash-attn is given the values in the same way
        value = functional.pad(value, (0, key.shape[-1] - width))
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch does before any kernel
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p=0.0, is_causal=is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out[..., :width]


def _for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    out = _flash(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make it known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _for_transformers)


register_attention()
