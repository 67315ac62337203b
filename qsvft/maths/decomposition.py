"""W -> U, s, V: singular vectors of the weight as held, by a method per matrix, with signs fixed by rule.

Exact, in fp64. The small side's vectors are eigenvectors of its Gram matrix, WᵀW = V S² Vᵀ (n <= m) or
W Wᵀ = U S² Uᵀ (m < n). The other side's, where both are wanted, are u_j = W v_j / s_j; that loses orthogonality
like n eps (s_1 / s_j)², so that the few directions where this exceeds 1e-6 are taken from a QR and a small SVD.
Rows are orthonormal to 1e-12, those of the other side to 1e-6. Drivers and thread counts agree to about 1e-10, far
below bf16's rounding, so the factors can be recomputed elsewhere.

Randomized, in fp64: directions that hold nearly the most energy that k directions can, from a block Krylov space
with a fixed start (:mod:`qsvft.maths.subspace`). Just as reproducible; where k is small some ten times as fast.
Single rows are singular vectors only where these are well separated.

Float32: either of them in fp32. Orthonormal to 1e-5 and a good subspace, but neighbouring vectors turn with the
driver and the thread count: an adapter on it fits only the bases it was trained on.

Weights are taken to the working precision a stretch of rows at a time, so that there is never a whole copy.

Signs: each singular vector v is turned so that <w, v> > 0 for one fixed sequence w that no
structured vector is orthogonal to. A rule such as "the largest entry is positive" has near-ties;
a flipped sign makes an adapter useless.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..options.choices import DECOMPOSITIONS
from .aligned import aligned
from .subspace import leading_directions

Sides = Literal["one", "both"]
Side = Literal["input", "output"]

_GOLDEN_RATIO = 0.6180339887498949
_RANDOMIZED_FROM = 1024
_RANDOMIZED_UP_TO = 1 / 8
_ORTHOGONALITY = 1e-6
_STRETCH = 2**21  # entries: 16 MiB in fp64; malloc gives larger pieces back, to be cleared anew each time
_THIN_STRETCH = 2**19  # entries: of 4 MiB, which the second product with a narrow block reads from a cache


@dataclass(frozen=True)
class Decomposer:
    """How a matrix is decomposed.

    Attributes:
        randomized: directions that hold nearly the most energy, and not the singular vectors.
        dtype: of the arithmetic, fp64 where the factors must come out the same elsewhere.
    """

    randomized: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        """ "exact", "randomized", "float32" or "float32, randomized"."""
        if self.dtype == torch.float64:
            return "randomized" if self.randomized else "exact"
        return "float32, randomized" if self.randomized else "float32"


EXACT = Decomposer()


def chosen_method(limit: int, rank: int, decomposition: str = "auto") -> Decomposer:
    """The method that a config's ``decomposition`` means for one matrix: a function of its shape and rank alone.

    Args:
        limit: how many directions there are, min(m, n).
        rank: k.
        decomposition: "exact", "randomized", "auto" (randomized where limit >= 1024 and 8 k <= limit, else exact) or
            "float32" (as auto, in fp32).

    Raises:
        ValueError: another name.
    """
    if decomposition not in DECOMPOSITIONS:
        names = ", ".join(map(repr, DECOMPOSITIONS))
        raise ValueError(f"decomposition: expected one of {names}, got {decomposition!r}")
    small = limit >= _RANDOMIZED_FROM and rank <= limit * _RANDOMIZED_UP_TO
    randomized = decomposition == "randomized" or (decomposition != "exact" and small)
    return Decomposer(randomized, torch.float32 if decomposition == "float32" else torch.float64)


@dataclass(frozen=True)
class Decomposition:
    """Singular vectors as rows, in the method's dtype.

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
    inner = vectors @ sign_reference(vectors.shape[1], vectors.device).to(vectors.dtype)
    return torch.where(inner < 0, -1.0, 1.0).to(vectors.dtype)


def stretches(weight: Tensor, dtype: torch.dtype = torch.float64, entries: int = _STRETCH) -> Iterator[Tensor]:
    """A weight in ``dtype``, some rows at a time, where BLAS sums as anywhere; the next may overwrite a stretch."""
    rows = max(entries // weight.shape[1], 1)
    if weight.dtype == dtype:
        yield from map(aligned, weight.split(rows))
        return
    held = torch.empty(min(rows, weight.shape[0]), weight.shape[1], dtype=dtype, device=weight.device)
    for part in weight.split(rows):  # one buffer for all: fresh memory for each costs more than the copy
        yield held[: part.shape[0]].copy_(part)


def decompose(weight: Tensor, rank: int, sides: Sides = "one", method: Decomposer = EXACT) -> Decomposition:
    """The first ``rank`` singular triplets of a weight.

    Args:
        weight: (m, n), finite, any floating dtype.
        rank: k, 1 <= k <= min(m, n).
        sides: "one" gives the small side's factor alone, "both" gives U and V.
        method: exact, randomized, and in which precision; see :func:`chosen_method`.

    Returns:
        A :class:`Decomposition`, signs fixed on the small side's vectors, the same for both forms.

    Raises:
        ValueError: a rank out of range.
    """
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank must lie in [1, {min(m, n)}] for a weight of shape ({m}, {n}), got {rank}")
    upright = small_side(weight.shape) == "input"
    tall = weight if upright else weight.T  # its rows are read, and its columns are the small side
    other = None
    if sides == "both" and not method.randomized and method.dtype != torch.float64:
        other, s, small = _svd(tall.to(method.dtype), rank)
    else:
        s, small = _small_side_vectors(tall, rank, method)
        if sides == "both":
            other, s, small = _with_other_side(tall, s, small)
    signs = _signs(small).unsqueeze(1)
    small = (small * signs).contiguous()
    other = (other * signs).contiguous() if other is not None else None
    return Decomposition(other, s, small) if upright else Decomposition(small, s, other)


def _small_side_vectors(tall: Tensor, rank: int, method: Decomposer) -> tuple[Tensor, Tensor]:
    """s and V (k, n) of a weight (m, n), signs not fixed."""
    if not method.randomized:
        squares, vectors = torch.linalg.eigh(_gram(tall, method.dtype))
        return squares.flip(0)[:rank].clamp_min(0).sqrt(), vectors.T.flip(0)[:rank]

    def product(block: Tensor) -> Tensor:
        total = torch.zeros_like(block)
        for part in stretches(tall, method.dtype, _THIN_STRETCH):
            total.addmm_(part.T, part @ block)
        return total

    def energy(block: Tensor) -> Tensor:
        total = block.new_zeros(block.shape[1], block.shape[1])
        for part in stretches(tall, method.dtype, _THIN_STRETCH):
            image = part @ block
            total.addmm_(image.T, image)
        return total

    return leading_directions(product, tall.shape[1], rank, method.dtype, tall.device, energy)


def _gram(tall: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ W, (n, n)."""
    gram: Tensor | None = None
    for part in stretches(tall, dtype):
        gram = part.T @ part if gram is None else gram.addmm_(part.T, part)
    assert gram is not None
    return gram


def _with_other_side(tall: Tensor, s: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (k, m), s and V, from s and V (k, n) of a weight (m, n) that V holds the leading directions of.

    W v_j / s_j where s_j is large enough. The rest of W V, made orthogonal to those, is decomposed by itself, which
    turns the last rows of V among themselves.
    """
    images = torch.cat([part @ V.T for part in stretches(tall, V.dtype)])
    bound = (torch.finfo(V.dtype).eps * tall.shape[1] / _ORTHOGONALITY) ** 0.5
    clear = int((s > bound * s[0]).sum())
    lengths = torch.linalg.vector_norm(images[:, :clear], dim=0)
    left = images[:, :clear] / lengths
    if clear < s.numel():
        Q, R = torch.linalg.qr(torch.cat([left, images[:, clear:]], 1))
        inner, tail, turn = torch.linalg.svd(R[clear:, clear:])
        left = torch.cat([left, Q[:, clear:] @ inner], 1)
        V = torch.cat([V[:clear], turn @ V[clear:]])
        s = torch.cat([s[:clear], tail]).cummin(0).values  # the two may cross by a rounding
    return left.T, s, V


def _svd(tall: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (k, m), s, V (k, n) by LAPACK; of the triangle alone where the weight is clearly oblong."""
    m, n = tall.shape
    if 2 * m >= 3 * n:
        Q, R = torch.linalg.qr(tall)
        left, s, right = torch.linalg.svd(R)
        left = Q @ left[:, :rank]
    else:
        left, s, right = torch.linalg.svd(tall, full_matrices=False)
    return left[:, :rank].T, s[:rank], right[:rank]
