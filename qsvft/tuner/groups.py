"""Layers that read the same input (q, k, v; gate, up) share one V, and compute Vᵀ x once.

The shared V holds the right singular vectors of the stacked weight. Each layer keeps its own M and its
own scale s_j = |W v_j|. Nothing depends on the inputs being the same but the saving: where they are not, a
layer computes its coefficients by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..maths.basis import Basis
from ..storage.basis_key import BasisKey
from ..storage.weights import dense_weight, read_through
from .adapted import AdaptedLinear
from .config import QSVFTConfig

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of siblings that read the same input, as transformers' models call them."""

_CROSS_ATTENTION = re.compile(r"(^|[._])(cross|crossattention|cross_attn|encoder_attn|EncDecAttention)([._]|$)")


class InputGroup:
    """Layers that share one V, while an adapter is attached to them.

    Args:
        model: where the layers are.
        members: their names in it.
        shapes: (outputs, inputs) of each.
        config: the adapter's config.

    Attributes:
        name: the members' last names, joined.
        size: n, the length of the input.
        limit: how many directions there are.
    """

    def __init__(
        self, model: nn.Module, members: Sequence[str], shapes: Sequence[tuple[int, int]], config: QSVFTConfig
    ) -> None:
        self._model, self.members = model, tuple(members)
        self.name = "_".join(member.rpartition(".")[2] for member in members)
        self.size = shapes[0][1]
        self.limit = self.size if config.basis == "hadamard" else min(sum(m for m, _ in shapes), self.size)

    def held(self) -> dict[BasisKey, Basis]:
        """The bases that its layers hold already, by their keys."""
        layers = (layer for layer in self._layers() if isinstance(layer, AdaptedLinear))
        return {key: basis for layer in layers for key, basis in layer.held_bases().items()}

    def weights(self) -> Iterator[Tensor]:
        """The layers' weights (m_i, n), dense."""
        for layer in self._layers():
            weight = layer.original_weight() if isinstance(layer, AdaptedLinear) else dense_weight(layer)
            yield read_through(layer, self.size) if weight is None else weight

    def _layers(self) -> Iterator[nn.Module]:
        return (self._model.get_submodule(name) for name in self.members)


def input_groups(model: nn.Module, shapes: Mapping[str, tuple[int, int]], config: QSVFTConfig) -> dict[str, InputGroup]:
    """The groups of a config among the targeted layers, by each member's name.

    Args:
        model: where the layers are.
        shapes: (outputs, inputs) of each targeted layer, by its name.
        config: the adapter's config.
    """
    if not config.share_inputs:
        return {}
    wanted = SAME_INPUT if config.share_inputs is True else config.share_inputs
    found: dict[str, InputGroup] = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        for siblings in wanted:
            # In cross attention the query reads another input than key and value.
            readers = siblings[1:] if len(siblings) == 3 and _CROSS_ATTENTION.search(parent) else siblings
            members = [f"{parent}.{leaf}" if parent else leaf for leaf in readers]
            members = [name for name in members if name in shapes and name not in found]
            if len(members) > 1 and len({shapes[name][1] for name in members}) == 1:
                group = InputGroup(model, members, [shapes[name] for name in members], config)
                found |= dict.fromkeys(members, group)
    return found
