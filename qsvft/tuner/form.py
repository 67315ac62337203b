"""Which of the three maps an adapter uses on a layer, and the keys of the bases that it reads and writes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..maths.decomposition import Decomposer, chosen_method, small_side
from ..storage.basis_key import BasisKey
from ..storage.residual import ResidualLinear
from .config import QSVFTConfig


@dataclass(frozen=True)
class Form:
    """One of the maps of :mod:`qsvft.maths.updates`, with the keys of the bases it reads and writes through.

    Attributes:
        kind: the map.
        inward, outward: the keys of the bases.
        error: the key of what the base's rounding took from the inward directions, where that is given back.
        method: how the singular vectors are computed.
    """

    kind: Literal["input", "output", "both"]
    inward: BasisKey
    outward: BasisKey
    method: Decomposer
    error: BasisKey | None = None

    @property
    def keys(self) -> tuple[BasisKey, ...]:
        """The keys, each once."""
        return tuple(dict.fromkeys(key for key in (self.inward, self.outward, self.error) if key is not None))

    def sizes(self, shape: tuple[int, int]) -> dict[BasisKey, int]:
        """The length of a direction of each basis, for a weight of shape (outputs, inputs)."""
        return {key: shape[1] if key.side == "V" else shape[0] for key in self.keys}


def form_of(config: QSVFTConfig, shape: tuple[int, int], rank: int) -> Form:
    """The form of an adapter on a weight of shape (outputs, inputs).

    Args:
        config: the adapter's config.
        shape: (m, n).
        rank: k on this layer.
    """
    method = chosen_method(min(shape), rank, str(config.decomposition))

    def key(side: str) -> BasisKey:
        if config.basis == "data":
            return BasisKey.data(side, config.stored_bits, rank)
        return BasisKey.singular(side, config.stored_bits, method, rank, original=config.residual)

    if config.sides == "both":
        error = key("E") if config.gives_back else None
        return Form("both", key("V"), key("U"), method, error)
    kind = small_side(shape)
    one = key("V" if kind == "input" else "U")
    return Form(kind, one, one, method)


def residual_key(side: str, base: ResidualLinear) -> BasisKey:
    """The key of the directions "U" or "V" that a residual base was made with."""
    held = base.basis(side)
    return BasisKey.singular(side, held.stored.bits, base.method, held.rank, original=True)
