"""Which of the three maps an adapter uses on a layer, and under which keys the layer holds its bases.

A layer holds a basis once for all adapters that agree on it. Its key says the side and how it came about:

    V_bf16, U_nf4            singular vectors of this layer's weight, in 16 or 4 bits
    V_int8_of_q_proj_k_proj  those of the stacked weight of layers that read the same input
    V_int8_original          those of the dense weight that a residual base was made from
    V_hadamard_0_64          64 directions of the seeded Hadamard basis
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..decomposition import small_side
from .config import QSVFTConfig

HELD = {16: "bf16", 8: "int8", 4: "nf4"}


@dataclass(frozen=True)
class Form:
    """One of the maps of :mod:`qsvft.functional`, with the keys of the bases it reads and writes through.

    Attributes:
        kind: the map.
        inward, outward: the keys of the bases.
        seeded: whether the basis comes from a seed and not from the weight.
        group: the layers that share the basis, if any.
    """

    kind: Literal["input", "output", "both"]
    inward: str
    outward: str
    seeded: bool = False
    group: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, each once."""
        return tuple(dict.fromkeys((self.inward, self.outward)))


def form_of(config: QSVFTConfig, shape: tuple[int, int], rank: int, group: str | None = None) -> Form:
    """The form of an adapter on a weight of shape (outputs, inputs).

    Args:
        config: the adapter's config.
        shape: (m, n).
        rank: k on this layer.
        group: the name of the group of layers whose input it shares, if any.
    """
    if config.basis == "hadamard":
        held = f"hadamard_{config.seed}_{rank}"
    else:
        held = HELD[config.factor_bits] + ("_original" if config.residual else "")
    if config.sides == "both":
        return Form("both", f"V_{held}", f"U_{held}")
    seeded = config.basis == "hadamard"
    if group is not None:
        key = f"V_{held}_of_{group}"
        return Form("input", key, key, seeded, group)
    kind = small_side(shape)
    key = f"{'V' if kind == 'input' else 'U'}_{held}"
    return Form(kind, key, key, seeded)
