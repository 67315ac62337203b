"""Weights that are one tensor under several names, and those that a checkpoint has twice after all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoint import Checkpoint

STRETCH_BYTES = 32 * 2**20
"""How much of two tied weights is compared at once."""


def holders(model: nn.Module) -> dict[str, str]:
    """For each name of the state dict the first name of the same tensor: itself, unless it is tied to one before."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def untie_what_differs(checkpoint: Checkpoint, model: PreTrainedModel, keys: Mapping[str, str]) -> None:
    """Untie weights that a model ties and of which its checkpoint has two that differ, as transformers does.

    Args:
        checkpoint: where they are compared.
        model: on the meta device, changed in place.
        keys: by name in the state dict, the key that gives it.
    """
    pairs: dict[str, str] = model.all_tied_weights_keys
    for name, other in list(pairs.items()):
        if name in keys and other in keys and not _same(checkpoint, keys[name], keys[other], model.get_parameter(name)):
            parent, _, leaf = name.rpartition(".")
            own = torch.empty_like(model.get_parameter(name))
            setattr(model.get_submodule(parent), leaf, nn.Parameter(own, requires_grad=False))
            del pairs[name]


def _same(checkpoint: Checkpoint, key: str, other: str, parameter: nn.Parameter) -> bool:
    """Whether two tensors have the same values in the parameter's dtype; shapes that differ are refused later."""
    shape = tuple(parameter.shape)
    if not shape or any(checkpoint.entries[each].shape != shape for each in (key, other)):
        return True
    rows = max(1, STRETCH_BYTES // max(1, parameter[0].numel() * 4))
    return all(
        torch.equal(*(checkpoint.read_rows(each, start, start + rows).to(parameter.dtype) for each in (key, other)))
        for start in range(0, shape[0], rows)
    )
