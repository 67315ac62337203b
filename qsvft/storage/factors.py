"""The frozen singular vectors beside a weight: which sides, how they are held, and their scale.

Held are U and V as rows in 16, 8 or 4 bits (:mod:`qsvft.storage.stored_matrix`). The scale of a direction is measured
on the vector as it is held, s_j = |W v_j| (or |Wᵀ u_j|): with rounded vectors that is more exact than
the singular value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..maths.basis import Basis, Held, add_coefficients, read_coefficients
from ..maths.decomposition import EXACT, Decomposer, Sides, decompose, small_side, stretches
from .stored_matrix import StoredMatrix

_STRETCH = 2**23  # entries, 64 MiB in fp64; each stretch reads the whole basis
_CACHED = 2**18  # entries, 2 MiB in fp64: read again from a processor's cache, four times as fast


class StoredBasis(nn.Module, Basis):
    """Directions held as the rows of a :class:`~qsvft.storage.stored_matrix.StoredMatrix`.

    Attributes:
        came_from: the source that all of them were read from; None if any were computed.
    """

    def __init__(self, stored: StoredMatrix) -> None:
        super().__init__()
        self.stored = stored
        self.came_from: object = None

    @property
    def rank(self) -> int:
        return self.stored.rows

    @property
    def size(self) -> int:
        return self.stored.columns

    def to_coefficients(self, a: Tensor, rank: int) -> Tensor:
        return read_coefficients(a, self.held(rank))

    def from_coefficients(self, base: Tensor, z: Tensor) -> Tensor:
        return add_coefficients(base, z, self.held(z.shape[1]))

    def held(self, rank: int) -> Held:
        return Held(self.stored.layout, self.stored.parts(0, rank))

    def dense(self, dtype: torch.dtype, rank: int | None = None) -> Tensor:
        return self.stored.dense(dtype, 0, rank)

    def extend(self, longer: StoredBasis) -> None:
        """Take the directions beyond one's own from a longer basis; those held stay as they are."""
        self.stored.append(longer.stored, self.rank)


def needed_sides(sides: Sides, shape: tuple[int, int] | torch.Size) -> tuple[bool, bool]:
    """(needs U, needs V) for a form on a weight of shape (m, n)."""
    if sides == "both":
        return True, True
    return small_side(shape) == "output", small_side(shape) == "input"


def make_bases(
    weight: Tensor, rank: int, sides: Sides, bits: int, method: Decomposer = EXACT
) -> dict[str, StoredBasis]:
    """Decompose a weight as held, and hold the vectors that a form needs.

    Args:
        weight: (m, n) dense, the dequantised weight; on meta only shapes are made.
        rank: k.
        sides: "one" or "both".
        bits: 16, 8 or 4, how the vectors are held.
        method: how the weight is decomposed, see :func:`~qsvft.maths.decomposition.chosen_method`.

    Returns:
        "U" and "V", or the one of them that the smaller side needs.
    """
    if weight.is_meta:
        needs = zip("UV", needed_sides(sides, weight.shape), weight.shape, strict=True)
        vectors = {side: weight.new_empty(rank, size) for side, needed, size in needs if needed}
    else:
        parts = decompose(weight, rank, sides, method)
        vectors = {side: rows for side, rows in (("U", parts.U), ("V", parts.V)) if rows is not None}
    return {side: StoredBasis(StoredMatrix.hold(rows, bits)) for side, rows in vectors.items()}


def frobenius_norm(weight: Tensor) -> Tensor:
    """|W|_F, a scalar in fp64, summed a stretch of rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    if not weight.is_meta:
        for part in stretches(weight, torch.float64, _CACHED):
            total = torch.hypot(total, torch.linalg.vector_norm(part))
    return total


def measured_scale(weight: Tensor, basis: Basis, side: str, rank: int) -> tuple[Tensor, Tensor]:
    """The lengths s_j that a weight gives to the directions of a basis, and their root mean square.

    Args:
        weight: (m, n) dense.
        basis: directions of the input ("V") or the output ("U"), as they are held.
        side: "V" or "U".
        rank: k, how many of the directions.

    Returns:
        s_j = |W v_j| or |Wᵀ u_j|, (k,) fp32, and |W|_F / sqrt(size), the root mean square of such lengths over a whole
        orthonormal basis, a scalar in fp32.
    """
    if weight.is_meta:
        return weight.new_empty(rank, dtype=torch.float32), weight.new_empty((), dtype=torch.float32)
    # In fp64: sums in another order, on another processor or of a weight that lies elsewhere, round to the same fp32.
    s, total = (torch.zeros(size, dtype=torch.float64, device=weight.device) for size in (rank, 1))
    with torch.no_grad():  # a row of the product is what the basis reads of a row of W
        for part in stretches(weight if side == "V" else weight.T, torch.float64, _STRETCH):
            read = basis.to_coefficients(part, rank)
            s = torch.hypot(s, torch.linalg.vector_norm(read, dim=0, dtype=torch.float64))
            total = torch.hypot(total, torch.linalg.vector_norm(part))
    return s.float(), (total[0] / basis.size**0.5).float()
