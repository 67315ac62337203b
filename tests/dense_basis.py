"""A basis that is a plain tensor of rows, in any floating dtype: what the others are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsvft.maths.basis import Basis, Held, Parts, Slices, add_coefficients, read_coefficients


class _Whole:
    """Reads a matrix that is dense already."""

    def by_rows(self, parts: Parts, dtype: torch.dtype) -> Slices:
        yield slice(None), parts[0].to(dtype)

    by_columns = by_rows


_WHOLE = _Whole()


@dataclass(frozen=True)
class DenseBasis(Basis):
    """Directions given as a plain tensor of rows in any floating dtype."""

    rows: Tensor

    @property
    def rank(self) -> int:
        return self.rows.shape[0]

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def to_coefficients(self, a: Tensor, rank: int) -> Tensor:
        return read_coefficients(a, self.held(rank))

    def from_coefficients(self, base: Tensor, z: Tensor) -> Tensor:
        return add_coefficients(base, z, self.held(z.shape[1]))

    def held(self, rank: int) -> Held:
        return Held(_WHOLE, (self.rows[:rank],))

    def dense(self, dtype: torch.dtype, rank: int | None = None) -> Tensor:
        return self.rows[:rank].to(dtype)
