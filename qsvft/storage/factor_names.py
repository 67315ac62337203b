"""The names under which factors are stored in safetensors files.

    qsvft.<layer>.<key>.<part>       a basis, in the parts of its StoredMatrix:
                                     values (16 bits), codes and scales (8), codes, maxima and scales (4)
    qsvft.<layer>.<key>.s            (k,) fp32, the lengths s_j = |W v_j| (or |Wᵀ u_j|) that a layer gives them
    qsvft.<layer>.<key>.rms          () fp32, the lengths' root mean square over a whole orthonormal basis
    qsvft.<layer>.<key>.residual_s   (k,) fp32, what a residual base adds along its directions
    qsvft.<layer>.<key>.scale        (k,) fp32, in an adapter: 1/s as it was trained with, in place of s and rms
    qsvft.<layer>.<key>.sketch       (8,) fp32, in an adapter: a fingerprint of the weight that the basis is of

<layer> is its module's name with "/" in place of "."; <key> says which basis it is (:mod:`qsvft.storage.basis_key`).
Anything may stand before "qsvft.".
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .basis_key import BasisKey
from .factors import StoredBasis

PARTS = {16: ("values",), 8: ("codes", "scales"), 4: ("codes", "maxima", "scales")}
"""The parts of a stored basis, by its bits."""

LENGTHS = ("s", "rms")
RESIDUAL, SCALE, SKETCH = "residual_s", "scale", "sketch"
_START = "qsvft."
_OF_BASES = frozenset(part for parts in PARTS.values() for part in parts)


class FactorName(NamedTuple):
    """What a factor tensor's name says: the layer's module name (with dots), the basis's key, and which part."""

    layer: str
    key: BasisKey
    part: str

    def __str__(self) -> str:
        return f"{_START}{self.layer.replace('.', '/')}.{self.key}.{self.part}"

    @property
    def of_basis(self) -> bool:
        """Whether it is a part of a basis."""
        return self.part in _OF_BASES


def parse_name(name: str) -> FactorName | None:
    """Read a tensor's name, whatever stands before its "qsvft."; None for one that is no factor's."""
    start = 0 if name.startswith(_START) else name.find(f".{_START}") + 1
    if not name.startswith(_START, start):
        return None
    parts = name[start + len(_START) :].split(".")
    if len(parts) != 3 or parts[2] not in (*_OF_BASES, *LENGTHS, RESIDUAL, SCALE, SKETCH):
        return None
    return FactorName(parts[0].replace("/", "."), BasisKey(parts[1]), parts[2])


def factor_tensors(layer: str, key: BasisKey, basis: StoredBasis, rank: int | None = None) -> dict[str, Tensor]:
    """The named tensors of a basis, as views.

    Args:
        layer: its module name; "" is the model itself.
        key: the basis's key.
        basis: what to store.
        rank: how many of its directions, all by default.
    """
    parts = zip(PARTS[basis.stored.bits], basis.stored.parts(0, rank), strict=True)
    return {str(FactorName(layer, key, part)): tensor for part, tensor in parts}


def adapter_tensors(layer: str, key: BasisKey, sketch: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
    """The named tensors of one layer in a self-contained adapter: of its weight (8,), and of a one-sided form (k,)."""
    tensors = {str(FactorName(layer, key, SKETCH)): sketch}
    return tensors if scale is None else {**tensors, str(FactorName(layer, key, SCALE)): scale}


def length_tensors(layer: str, key: BasisKey, s: Tensor, rms: Tensor) -> dict[str, Tensor]:
    """The named tensors of :func:`~qsvft.storage.factors.measured_scale`: s (k,) and rms (), both fp32."""
    return {str(FactorName(layer, key, part)): value for part, value in zip(LENGTHS, (s, rms), strict=True)}


def residual_tensors(layer: str, key: BasisKey, s: Tensor) -> dict[str, Tensor]:
    """The named tensor of a residual base's own s, (k,) fp32."""
    return {str(FactorName(layer, key, RESIDUAL)): s}
