"""W -> U, s, V: singular vectors of the weight as held, in fp64, with signs fixed by rule.

One-sided: eigenvectors of the Gram matrix of the small side, WᵀW = V S² Vᵀ (n <= m) or
W Wᵀ = U S² Uᵀ (m < n), in fp64. Drivers and thread counts then agree to about 1e-10, far below
bf16's rounding, so the factors can be recomputed elsewhere. Two-sided: the fp64 SVD.

Signs: each singular vector v is turned so that <w, v> > 0 for one fixed sequence w that no
structured vector is orthogonal to. A rule such as "the largest entry is positive" has near-ties;
a flipped sign makes an adapter useless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Sides = Literal["one", "both"]
Side = Literal["input", "output"]

_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class Decomposition:
    """Singular vectors as rows, fp64.

    Attributes:
        U: (k, m) or None, the left singular vectors.
        s: (k,), singular values, descending.
        V: (k, n) or None, the right singular vectors.
    """

    U: Tensor | None
    s: Tensor
    V: Tensor | None


def small_side(shape: tuple[int, int] | torch.Size) -> Side:
    """Which side the one-sided form holds for a weight of m outputs and n inputs."""
    m, n = shape
    return "input" if n <= m else "output"


def sign_reference(size: int, device: torch.device | None = None) -> Tensor:
    """The fixed sequence w_i = frac((i+1) * golden ratio) - 1/2 + 1/8 that decides signs, fp64."""
    index = torch.arange(1, size + 1, dtype=torch.float64, device=device)
    return torch.frac(index * _GOLDEN_RATIO) - 0.375


def _signs(vectors: Tensor) -> Tensor:
    """+1 or -1 for each row."""
    inner = vectors @ sign_reference(vectors.shape[1], vectors.device)
    return torch.where(inner < 0, -1.0, 1.0).to(vectors.dtype)


def decompose(weight: Tensor, rank: int, sides: Sides = "one") -> Decomposition:
    """The first ``rank`` singular triplets of a weight.

    Args:
        weight: (m, n), finite, any floating dtype; taken to fp64.
        rank: k, 1 <= k <= min(m, n).
        sides: "one" gives the small side's factor alone, "both" gives U and V.

    Returns:
        A :class:`Decomposition`, signs fixed on the small side's vectors, the same for both forms.
    """
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank must lie in [1, {min(m, n)}] for a weight of shape ({m}, {n}), got {rank}")
    W = weight.to(torch.float64)
    if sides == "both":
        left, s, right = torch.linalg.svd(W, full_matrices=False)
        U, s, V = left.T[:rank], s[:rank], right[:rank]
        signs = _signs(V if small_side(weight.shape) == "input" else U).unsqueeze(1)
        return Decomposition((U * signs).contiguous(), s.contiguous(), (V * signs).contiguous())

    side = small_side(weight.shape)
    s, basis = vectors_of_gram(W.T @ W if side == "input" else W @ W.T, rank)
    return Decomposition(None, s, basis) if side == "input" else Decomposition(basis, s, None)


def vectors_of_gram(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first singular values and vectors of a weight from its Gram matrix WᵀW, or W Wᵀ.

    Args:
        gram: (n, n) fp64, symmetric.
        rank: k.

    Returns:
        s (k,), descending, and the vectors as rows (k, n), signs fixed.
    """
    squares, vectors = torch.linalg.eigh(gram)
    s = squares.flip(0)[:rank].clamp_min(0).sqrt()
    basis = vectors.T.flip(0)[:rank]
    return s, (basis * _signs(basis).unsqueeze(1)).contiguous()
