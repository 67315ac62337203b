"""Which of the three maps an adapter uses on a layer, and under which keys the layer holds its bases.

A layer holds a basis once for all adapters that agree on it. Its key says the side and how it came about:

    V_bf16, U_nf4            singular vectors of this layer's weight, in 16 or 4 bits
    V_int8_of_q_proj_k_proj  those of the stacked weight of layers that read the same input
    V_bf16_randomized_256    256 randomized directions; those of another rank are others, and never extend them
    V_bf16_float32           singular vectors computed in fp32; V_bf16_float32_256 where they are randomized
    V_int8_original          those of the dense weight that a residual base was made from
    V_hadamard_0_64          64 directions of the seeded Hadamard basis

The parts go together: V_nf4_randomized_256_of_gate_proj_up_proj.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..maths.decomposition import EXACT, Method, chosen_method, small_side
from ..storage.residual import ResidualLinear
from .config import QSVFTConfig

HELD = {16: "bf16", 8: "int8", 4: "nf4"}


@dataclass(frozen=True)
class Form:
    """One of the maps of :mod:`qsvft.maths.updates`, with the keys of the bases it reads and writes through.

    Attributes:
        kind: the map.
        inward, outward: the keys of the bases.
        seeded: whether the basis comes from a seed and not from the weight.
        group: the layers that share the basis, if any.
        method: how the singular vectors are computed.
    """

    kind: Literal["input", "output", "both"]
    inward: str
    outward: str
    seeded: bool = False
    group: str | None = None
    method: Method = EXACT

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, each once."""
        return tuple(dict.fromkeys((self.inward, self.outward)))

    def sizes(self, shape: tuple[int, int]) -> dict[str, int]:
        """The length of a direction of each basis, for a weight of shape (outputs, inputs)."""
        return {key: shape["UV".index(key[0])] for key in self.keys}


def form_of(
    config: QSVFTConfig, shape: tuple[int, int], rank: int, group: str | None = None, limit: int | None = None
) -> Form:
    """The form of an adapter on a weight of shape (outputs, inputs).

    Args:
        config: the adapter's config.
        shape: (m, n).
        rank: k on this layer.
        group: the name of the group of layers whose input it shares, if any.
        limit: how many directions the group's stacked weight has; min(m, n) without a group.
    """
    method = EXACT
    if config.basis == "hadamard":
        held = f"hadamard_{config.seed}_{rank}"
    else:
        method = chosen_method(min(shape) if limit is None else limit, rank, str(config.decomposition))
        held = HELD[config.factor_bits] + _how(method, rank) + ("_original" if config.residual else "")
    if config.sides == "both":
        return Form("both", f"V_{held}", f"U_{held}", method=method)
    seeded = config.basis == "hadamard"
    if group is not None:
        key = f"V_{held}_of_{group}"
        return Form("input", key, key, seeded, group, method)
    kind = small_side(shape)
    key = f"{'V' if kind == 'input' else 'U'}_{held}"
    return Form(kind, key, key, seeded, method=method)


def plain_key(key: str) -> str:
    """The key without the number of a basis that is held beside another one (see :mod:`qsvft.tuner.bases`)."""
    return key.partition("@")[0]


def is_shared(key: str) -> bool:
    """Whether the key is that of a basis which layers share."""
    return "_of_" in key


def residual_key(side: str, base: ResidualLinear) -> str:
    """The key of the directions "U" or "V" that a residual base was made with."""
    held = base.basis(side)
    return f"{side}_{HELD[held.stored.bits]}{_how(base.method, held.rank)}_original"


def _how(method: Method, rank: int) -> str:
    """A method's part of a key: none for the exact singular vectors."""
    if method.dtype != EXACT.dtype:
        return f"_float32_{rank}" if method.randomized else "_float32"
    return f"_randomized_{rank}" if method.randomized else ""
