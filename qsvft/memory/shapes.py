"""Models without values: 4-bit layers and adapters on the meta device, for counting bytes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..storage.nf4 import empty_nf4_linear
from ..storage.quantization import partition_linears, set_flags
from .attention import model_that_counts


def model_without_values(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A causal language model on the meta device, frozen."""
    try:
        with torch.device("meta"):
            model = model_that_counts(config, dtype)
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
