"""The digests in an adapter's file, which show that what is together belongs together, and is as it was saved.

``qsvft_digest`` of a layer is over its place in the model, its map in words, and the name, dtype, shape and bytes of
each of its tensors; ``qsvft_whole`` is over the digests of all layers and the modules that were trained whole. Neither
is a signature: whoever changes a file on purpose can make them anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from torch import Tensor

from .adapted import AdaptedLinear
from .probe import content_digest
from .self_contained import FactorDigests


def layer_digest(
    name: str, layer: AdaptedLinear, adapter: str, tensors: Mapping[str, Tensor], factors: FactorDigests
) -> Tensor:
    """SHA-256 of what an adapter's file has for one layer, and of what its config says about the map there.

    Args:
        name: the layer's name in the model.
        layer: with the adapter's form, pattern and unit.
        adapter: its name.
        tensors: those of the file, by the last part of their names.
        factors: those of the file.
    """
    form, pattern = layer.forms[adapter], layer.pattern(adapter)
    words = {
        "layer": _place(name, 1),
        "form": form.kind,
        "bases": [key.plain for key in form.keys],
        "entries": pattern.digest(),
        "factors": factors.of_layer(layer, adapter, described=True),
    }
    return content_digest(json.dumps(words, sort_keys=True), *_described(tensors))


def layer_digest_before(
    layer: AdaptedLinear, adapter: str, tensors: Mapping[str, Tensor], factors: FactorDigests
) -> Tensor:
    """The same as it was in files from before: over bytes alone, and not bound to the layer's place."""
    known = [tensors[leaf] for leaf in ("qsvft_M.weight", "qsvft_probe", "qsvft_base", "qsvft_unit") if leaf in tensors]
    return content_digest(*known, layer.pattern(adapter).digest(), factors.of_layer(layer, adapter))


_ROWS = ".trainable_tokens_delta"


def whole_digest(layers: Mapping[str, Tensor], whole: Mapping[str, Tensor], adapter: str) -> Tensor:
    """SHA-256 of all of an adapter.

    Args:
        layers: their digests, by their names.
        whole: the tensors of what was trained whole, by their names in the model's state.
        adapter: its name, which those names hold.
    """
    plain = {_rows_of_any(key, adapter): tensor for key, tensor in _plain(whole, adapter).items()}
    return content_digest(*_in_place(_placed(layers, 1)), *_in_place(_placed(plain, 2)))


def whole_digest_before(layers: Mapping[str, Tensor], whole: Mapping[str, Tensor], adapter: str) -> Tensor:
    """The same as it was in files from before: of an encoder's and a decoder's layers the last alone."""
    both = (_placed(layers, 1), _placed(_plain(whole, adapter), 2))
    last = [list({one[0]: one for one in placed}.values()) for placed in both]
    return content_digest(*_in_place(last[0]), *_in_place(last[1]))


def _rows_of_any(key: str, adapter: str) -> str:
    """The same for trained rows of embeddings under whatever name of the adapter, and in its file."""
    stem = key.removesuffix(f"{_ROWS}.{adapter}").removesuffix(_ROWS)
    return key if stem == key else f"{stem}{_ROWS}.default"


def _plain(whole: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """By their names in a model without adapters."""
    named = {key.replace(f".modules_to_save.{adapter}", ""): tensor for key, tensor in whole.items()}
    return {key.replace(".base_layer.", "."): tensor for key, tensor in named.items()}


def _place(name: str, last: int) -> str:
    """The numbers and the last parts of a name: libraries rename what stands before, and an adapter is the same."""
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-last] if part.isdigit()), *parts[-last:]])


def _placed(tensors: Mapping[str, Tensor], last: int) -> list[tuple[str, str, Tensor]]:
    """(place, name, tensor) of each."""
    return [(_place(name, last), name, tensor) for name, tensor in tensors.items()]


def _in_place(placed: list[tuple[str, str, Tensor]]) -> Iterator[Tensor | str]:
    """By place, and by name where several have one."""
    for place, _, tensor in sorted(placed, key=lambda one: one[:2]):
        yield from _described({place: tensor})


def _described(tensors: Mapping[str, Tensor]) -> Iterator[Tensor | str]:
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)} "
        yield tensor
