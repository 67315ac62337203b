"""How the frozen factors are held beside a weight: which sides, in which dtype, with which scale.

Held are U and V as rows in bf16, s_j = |W v_j| (small side V) or |Wᵀ u_j| (small side U) of the
*rounded* vectors in fp32, and
the root mean square of all singular values. With rounded vectors |W v_j| is the more exact scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decomposition import Decomposition, Sides, decompose, small_side

FACTOR_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Factors:
    """The frozen factors of one weight.

    Attributes:
        U: (k, m) bf16 or None.
        V: (k, n) bf16 or None.
        s: (k,) fp32, measured on the rounded vectors.
        rms: scalar fp32, |W|_F / sqrt(min(m, n)).
    """

    U: Tensor | None
    V: Tensor | None
    s: Tensor
    rms: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = (self.U, self.V, self.s, self.rms)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def needed_sides(sides: Sides, shape: tuple[int, int] | torch.Size) -> tuple[bool, bool]:
    """(needs U, needs V) for a form on a weight of shape (m, n)."""
    if sides == "both":
        return True, True
    return small_side(shape) == "output", small_side(shape) == "input"


def make_factors(weight: Tensor, rank: int, sides: Sides) -> Factors:
    """Decompose a weight as held and round its factors for holding.

    Args:
        weight: (m, n) dense, the dequantised weight.
        rank: k.
        sides: "one" or "both".
    """
    return _empty(weight, rank, sides) if weight.is_meta else hold(decompose(weight, rank, sides), weight)


def _empty(weight: Tensor, rank: int, sides: Sides) -> Factors:
    """Factors without values, for counting bytes."""
    m, n = weight.shape
    needs_u, needs_v = needed_sides(sides, weight.shape)
    U = weight.new_empty((rank, m), dtype=FACTOR_DTYPE) if needs_u else None
    V = weight.new_empty((rank, n), dtype=FACTOR_DTYPE) if needs_v else None
    s = weight.new_empty(rank, dtype=torch.float32)
    return Factors(U, V, s, weight.new_empty((), dtype=torch.float32))


def hold(parts: Decomposition, weight: Tensor) -> Factors:
    """Round a decomposition and measure the scale of the rounded vectors."""
    W = weight.to(torch.float64)
    U = None if parts.U is None else parts.U.to(FACTOR_DTYPE)
    V = None if parts.V is None else parts.V.to(FACTOR_DTYPE)
    small, product = (V, W) if small_side(W.shape) == "input" else (U, W.T)
    assert small is not None
    s = torch.linalg.vector_norm(product @ small.double().T, dim=0)
    rms = torch.linalg.matrix_norm(W) / min(W.shape) ** 0.5
    return Factors(U, V, s.float(), rms.float())
