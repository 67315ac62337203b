"""Models without values: 4-bit layers and adapters on the meta device, for counting bytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..quantization import partition_linears, set_flags

BLOCK, NESTED_BLOCK = 64, 256


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
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


def nf4_on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Give the linears the shapes that ``qsvft.quantize(model, bits=4)`` gives them."""
    targets, skipped = partition_linears(model, [])
    for name in targets:
        model.set_submodule(name, _nf4_layer(model.get_submodule(name)))
    set_flags(model, 4, torch.bfloat16, skipped)
    return model


def _nf4_layer(layer: Any) -> nn.Module:
    n, m = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    dtype = layer.weight.dtype
    new = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    blocks = -(-m * n // BLOCK)

    def meta(count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    nested = QuantState(
        absmax=meta(-(-blocks // NESTED_BLOCK), torch.float32),
        code=meta(256, torch.float32),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=meta(blocks, torch.uint8),
        shape=torch.Size((m, n)),
        code=meta(16, torch.float32),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), dtype=torch.float32, device="meta"),
        state2=nested,
    )
    new.weight = bnb.nn.Params4bit(
        torch.empty((m * n + 1) // 2, 1, dtype=torch.uint8, device="meta"),
        requires_grad=False,
        quant_state=state,
        quant_type="nf4",
        bnb_quantized=True,
    )
    new.quant_state = state
    new.bias = layer.bias
    new.source_cls = type(layer)
    new.support_avx512bf16_for_cpu = False
    return new


# --- attention ------------------------------------------------------------------------------------

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
