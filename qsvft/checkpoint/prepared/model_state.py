"""The tensors of a prepared directory, from a model in memory: weights without adapters, and factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...lean.vocabulary import QuantizedModule
from ...storage.factor_files import factor_tensors, length_tensors, residual_tensors
from ...storage.factors import measured_scale
from ...storage.residual import ResidualLinear
from ...tuner.adapted import AdaptedLinear
from ...tuner.form import residual_key


def state_of(model: nn.Module) -> dict[str, Any]:
    """The state dict that a prepared directory holds.

    Adapters are left out: what they wrap goes by the name that it has without them. Factors are those that the
    model was loaded with, or else those that its adapters hold.

    Args:
        model: a transformers model, with adapters or without.

    Raises:
        ValueError: merged adapters, or a vocabulary held in 8 or 4 bits.
    """
    _check(model)
    tensors = {
        name: value for key, value in model.state_dict().items() if (name := _name_without_adapters(key)) is not None
    }
    for name, module in model.named_modules():
        if isinstance(module, ResidualLinear):
            tensors |= _directions(_name_without_adapters(name) or name, module)
    for name in _tied_names(model, tensors):
        del tensors[name]
    files = vars(model).get("qsvft_factors")
    return tensors | (files.tensors() if files is not None else held_factors(model))


def _tied_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names under which a weight is there a second time: a file holds each once."""
    pairs: dict[str, str] = vars(model).get("all_tied_weights_keys", {})
    both = [(name, other) for name, other in pairs.items() if name in tensors and other in tensors]
    return [
        name
        for name, other in both
        if not tensors[name].is_meta and tensors[name].data_ptr() == tensors[other].data_ptr() != 0
    ]


def held_factors(model: nn.Module) -> dict[str, Tensor]:
    """The stored bases that a model's adapters use, each once, and the lengths that layers give their directions."""
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        one_sided = {form.inward for form in layer.forms.values() if form.kind != "both"}
        for key, basis in layer.held_bases().items():
            if key != key.plain or key.from_data:
                continue  # a basis that an adapter brought along, or that came from data, is the adapter's
            tensors |= factor_tensors(name, key, basis)
            if key in one_sided:
                s, rms = measured_scale(layer.original_weight(), basis, key.side, basis.rank)
                tensors |= length_tensors(name, key, s, rms)
    return tensors


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and module.merged:
            raise ValueError(
                f"{name}: adapters are merged into its weight; a prepared directory holds the quantised weight without "
                "any. Call unmerge_adapter() first, or save the merged model (merge_and_unload())."
            )
        if isinstance(module, QuantizedModule):
            raise ValueError(
                f"{name}: its weight is held in {module.stored.bits} bits; a prepared directory holds embeddings and "
                "head as they were. Call qsvft.vocabulary.dequantize_vocabulary(model) first, and quantize_embeddings= "
                "again when it is loaded."
            )


def _name_without_adapters(key: str) -> str | None:
    """The name of a tensor in the model without adapters, None for what belongs to an adapter."""
    parts = key.split(".")
    if any(part.startswith("qsvft_") for part in parts) or "modules_to_save" in parts:
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module", "residual"))


def _directions(name: str, layer: ResidualLinear) -> dict[str, Tensor]:
    """U, V and s, which are added to the quantised residual."""
    U, V = (residual_key(side, layer) for side in "UV")
    tensors = factor_tensors(name, U, layer.basis("U")) | factor_tensors(name, V, layer.basis("V"))
    return tensors | residual_tensors(name, V, layer.qsvft_s)
