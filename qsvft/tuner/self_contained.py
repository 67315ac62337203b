"""A self-contained adapter (``include_factors=True``) carries its factors in adapter_model.safetensors.

Beside each layer's records stand, under the names of :mod:`qsvft.storage.factor_names`: the directions of its bases
that the adapter reads, the scale 1/s of a one-sided form as it was trained with, and a sketch of the weight that the
factors are of.

Attaching maps the factors into memory from the file. PEFT itself reads the whole file to its ``torch_device`` before
it hands the state dict over: on a small card load with ``torch_device="cpu"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..storage.factor_names import PARTS, SCALE, SKETCH, FactorName, adapter_tensors, factor_tensors, parse_name
from .adapted import AdaptedLinear
from .probe import content_digest, weight_sketch


def stored_factors(layers: Iterable[AdaptedLinear], adapter: str) -> dict[str, Tensor]:
    """The factor tensors of an adapter's layers, by their names."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        form, rank = layer.forms[adapter], layer.pattern(adapter).rank
        for held in form.keys:
            tensors |= factor_tensors(layer.module_name, held.plain, layer.basis(held), rank)
        scale = layer.qsvft_scale[adapter] if form.kind != "both" else None
        sketch = weight_sketch(layer.original_weight())
        tensors |= adapter_tensors(layer.module_name, form.inward.plain, sketch, scale)
    return tensors


class FactorDigests:
    """The SHA-256 of the factors that stand for a layer in an adapter's file.

    Args:
        tensors: the factor tensors in the file.
        complete: whether the file must have all of a layer's, because its config says so.
    """

    def __init__(self, tensors: Mapping[FactorName, Tensor], complete: bool) -> None:
        self._tensors, self._complete = tensors, complete

    def of_layer(self, layer: AdaptedLinear, adapter: str, described: bool = False) -> str:
        """One text for all of a layer's factors, "" for none; ``described`` with their names, dtypes and shapes.

        Raises:
            ValueError: one of them is missing.
        """
        form = layer.forms[adapter]
        names = [FactorName(layer.module_name, form.inward.plain, SKETCH)]
        if form.kind != "both":
            names.append(names[0]._replace(part=SCALE))
        for held in form.keys:
            names += [FactorName(layer.module_name, held.plain, part) for part in PARTS[layer.basis(held).stored.bits]]
        return "".join(self._of_tensor(name, described) for name in names)

    def _of_tensor(self, name: FactorName, described: bool) -> str:
        if name not in self._tensors:
            if self._complete:
                raise ValueError(
                    f"{name.layer}: the adapter says include_factors, but its file has no tensor {name}; found "
                    f"{len(self._tensors)} other factors. It is incomplete: copy it again, or save the adapter again."
                )
            return ""
        tensor = self._tensors[name]
        what = f"{name.key} {name.part} {tensor.dtype} {tuple(tensor.shape)} " if described else ""
        return what + bytes(content_digest(tensor).tolist()).hex()


def split_factors(state_dict: Mapping[str, Tensor]) -> tuple[dict[FactorName, Tensor], dict[str, Tensor]]:
    """The factor tensors of an adapter's file by what their names say, and all others."""
    names = {key: parse_name(key) for key in state_dict}
    factors = {name: state_dict[key] for key, name in names.items() if name is not None}
    return factors, {key: value for key, value in state_dict.items() if names[key] is None}
