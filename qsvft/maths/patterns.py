"""Which entries of M train: the four patterns of the SVFT paper (arXiv 2405.19597, section 3.1), and all of them.

=========  ==========  ==========================================================================
pattern    the paper   entries of the k x k matrix M
=========  ==========  ==========================================================================
plain      SVFT^P      the diagonal: k
banded     SVFT^B      the diagonal and d off-diagonals on each side: k(2d+1) - d(d+1)
random     SVFT^R      as many as the band, uniformly without replacement, from a seed
top_k      SVFT^T      as many as the band, those with the largest |u_iᵀ v_j|
dense                  all: k * k, for a small k
=========  ==========  ==========================================================================

A pattern knows its entries (in row-major order, the order in which M's values are stored) and how
to multiply with them. It holds no trainable tensor.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .banded_coefficients import banded_coefficients
from .coefficients import Scale, ScaleSide
from .dense_coefficients import dense_coefficients
from .indexed_coefficients import entry_rows, indexed_coefficients


def banded_count(rank: int, off_diagonals: int) -> int:
    """Entries of a band: k(2d+1) - d(d+1)."""
    return rank * (2 * off_diagonals + 1) - off_diagonals * (off_diagonals + 1)


class Pattern(nn.Module, ABC):
    """A fixed set of entries of the k x k matrix M."""

    rank: int
    count: int

    @abstractmethod
    def indices(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the entries, int64, row-major."""

    @abstractmethod
    def product(self, h: Tensor, values: Tensor, scale: Scale = None, scale_side: ScaleSide = "rows") -> Tensor:
        """z = N h with N = diag(scale) M or M diag(scale); h and z are (tokens, k)."""

    def dense(self, values: Tensor) -> Tensor:
        """M as a dense k x k matrix: the reference that products are held against."""
        rows, columns = self.indices()
        matrix = values.new_zeros(self.rank, self.rank)
        return matrix.index_put((rows.to(values.device), columns.to(values.device)), values)

    def digest(self) -> str:
        """SHA-256 of the entries' flat positions i * k + j as little-endian int64."""
        rows, columns = self.indices()
        flat = (rows * self.rank + columns).to("cpu", torch.int64).contiguous()
        return hashlib.sha256(flat.numpy().astype("<i8").tobytes()).hexdigest()


class BandedPattern(Pattern):
    """|i - j| <= d. With d = 0 it is the plain pattern."""

    def __init__(self, rank: int, off_diagonals: int) -> None:
        super().__init__()
        if not 0 <= off_diagonals < rank:
            raise ValueError(f"off_diagonals must lie in [0, {rank - 1}] for rank {rank}, got {off_diagonals}")
        self.rank, self.off_diagonals = rank, off_diagonals
        self.count = banded_count(rank, off_diagonals)

    def indices(self) -> tuple[Tensor, Tensor]:
        d = self.off_diagonals
        rows = torch.arange(self.rank).unsqueeze(1).expand(-1, 2 * d + 1)
        columns = rows + torch.arange(-d, d + 1)
        inside = (columns >= 0) & (columns < self.rank)
        return rows[inside], columns[inside]

    def product(self, h: Tensor, values: Tensor, scale: Scale = None, scale_side: ScaleSide = "rows") -> Tensor:
        return banded_coefficients(h, values, self.off_diagonals, scale, scale_side)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, off_diagonals={self.off_diagonals}, entries={self.count}"


class DensePattern(Pattern):
    """All entries of a small M."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.count = rank, rank * rank

    def indices(self) -> tuple[Tensor, Tensor]:
        index = torch.arange(self.rank)
        return index.repeat_interleave(self.rank), index.repeat(self.rank)

    def product(self, h: Tensor, values: Tensor, scale: Scale = None, scale_side: ScaleSide = "rows") -> Tensor:
        return dense_coefficients(h, values, scale, scale_side)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, entries={self.count}"


class IndexPattern(Pattern):
    """Any list of entries, held as int32 columns and row offsets (compressed rows)."""

    columns: Tensor
    offsets: Tensor

    def __init__(self, rank: int, flat: Tensor) -> None:
        """Args: rank: k. flat: positions i * k + j of the entries, int64, any order, no repeats."""
        super().__init__()
        flat = torch.sort(flat.to("cpu", torch.int64)).values
        if flat.numel() and not (int(flat[0]) >= 0 and int(flat[-1]) < rank * rank):
            raise ValueError(f"pattern positions must lie in [0, {rank * rank}) for rank {rank}")
        if bool((flat.diff() == 0).any()):
            raise ValueError("pattern positions must not repeat")
        self.rank, self.count = rank, flat.numel()
        counts = torch.bincount(flat // rank, minlength=rank)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.register_buffer("columns", (flat % rank).to(torch.int32), persistent=False)
        self.register_buffer("offsets", offsets.to(torch.int32), persistent=False)

    @classmethod
    def without_values(cls, rank: int, count: int) -> IndexPattern:
        """A pattern of ``count`` entries on the meta device, for counting bytes."""
        pattern = cls(rank, torch.zeros(0, dtype=torch.int64))
        pattern.count = count
        pattern.columns = torch.empty(count, dtype=torch.int32, device="meta")
        pattern.offsets = torch.empty(rank + 1, dtype=torch.int32, device="meta")
        return pattern

    def indices(self) -> tuple[Tensor, Tensor]:
        return entry_rows(self.columns, self.offsets).long(), self.columns.long()

    def flat(self) -> Tensor:
        """Positions i * k + j, int64, ascending: what a saved adapter stores."""
        rows, columns = self.indices()
        return rows * self.rank + columns

    def product(self, h: Tensor, values: Tensor, scale: Scale = None, scale_side: ScaleSide = "rows") -> Tensor:
        return indexed_coefficients(h, values, self.columns, self.offsets, scale, scale_side)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, entries={self.count}"


def plain(rank: int) -> BandedPattern:
    """SVFT^P: the diagonal."""
    return BandedPattern(rank, 0)


def banded(rank: int, off_diagonals: int) -> BandedPattern:
    """SVFT^B: the diagonal and d off-diagonals on each side."""
    return BandedPattern(rank, off_diagonals)


def random_entries(rank: int, off_diagonals: int, seed: str) -> IndexPattern:
    """SVFT^R: as many entries as the band with d off-diagonals, uniformly without replacement.

    Drawn with Python's Mersenne Twister from a text seed, so that the same seed gives the same
    entries on every machine and with every torch.
    """
    count = banded_count(rank, off_diagonals)
    flat = random.Random(seed).sample(range(rank * rank), count)
    return IndexPattern(rank, torch.tensor(flat, dtype=torch.int64))


def top_entries(U: Tensor, V: Tensor, off_diagonals: int) -> IndexPattern:
    """SVFT^T: as many entries as the band, those with the largest |u_iᵀ v_j|.

    Args:
        U: (k, m), row i is u_i.
        V: (k, n), row j is v_j.
        off_diagonals: d, which sets the number of entries.

    Where m and n differ the paper leaves u_iᵀ v_j undefined (its code ranks the entries of the
    square factor). Here the shorter vector is continued with zeros, that is, the product runs over
    the first min(m, n) coordinates; for square weights this is the paper's definition.
    """
    rank, width = U.shape[0], min(U.shape[1], V.shape[1])
    scores = (U[:, :width].double() @ V[:, :width].double().T).abs()
    count = banded_count(rank, off_diagonals)
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    return IndexPattern(rank, order[:count])
