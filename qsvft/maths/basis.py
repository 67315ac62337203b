"""A basis: k directions of one side of a weight, and the two maps that an adapter needs of them.

    to coefficients      h = F a                 (tokens, n) -> (tokens, k)
    and back             base + z F              (tokens, k) -> (tokens, n)

F is (k, n), row j is the j-th direction. How F is held is each basis's own matter: as rows in 16, 8 or 4 bits, say
(:mod:`qsvft.storage.factors`). A basis is frozen; gradients flow to a, base and z.

F is made dense in the activation's dtype where it is used, a slice after the other, and dropped again: autograd
keeps the parts as they are held, and neither a nor z.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]
Slices = Iterator[tuple[slice, Tensor]]


class Reader(Protocol):
    """Makes the dense (k, n) matrix of the parts that hold it, in stretches of its rows or of its columns."""

    def by_rows(self, parts: Parts, dtype: torch.dtype) -> Slices:
        """(rows, their dense part), one after the other."""

    def by_columns(self, parts: Parts, dtype: torch.dtype) -> Slices:
        """(columns, their dense part), one after the other."""


class Held(NamedTuple):
    """A matrix as it is held, and what reads it."""

    read: Reader
    parts: Parts


class Basis(ABC):
    """k directions of R^n."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """k, how many directions there are."""

    @property
    @abstractmethod
    def size(self) -> int:
        """n, the length of a direction."""

    @abstractmethod
    def to_coefficients(self, a: Tensor, rank: int) -> Tensor:
        """h = F a with the first ``rank`` directions: (tokens, n) gives (tokens, rank)."""

    @abstractmethod
    def from_coefficients(self, base: Tensor, z: Tensor) -> Tensor:
        """base + z F with as many directions as z has columns: (tokens, n) and (tokens, rank) give (tokens, n)."""

    @abstractmethod
    def held(self, rank: int) -> Held:
        """The first ``rank`` directions as they are held."""

    @abstractmethod
    def dense(self, dtype: torch.dtype, rank: int | None = None) -> Tensor:
        """The first ``rank`` directions as rows, (rank, n)."""


def read_coefficients(a: Tensor, F: Held) -> Tensor:
    """h = F a."""
    result: Tensor = _ToCoefficients.apply(a, F.read, *F.parts)
    return result


def add_coefficients(base: Tensor, z: Tensor, F: Held) -> Tensor:
    """base + z F."""
    result: Tensor = _FromCoefficients.apply(base, z, F.read, *F.parts)
    return result


class _ToCoefficients(torch.autograd.Function):
    """h = a Fᵀ. Keeps F as it is held, not the activation.

    F is frozen and alive anyway, so it is no saved tensor: a checkpoint's recomputation, which ends with the last
    saved tensor, then ends with h.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, read: Reader, *parts: Tensor) -> Tensor:
        ctx.F = Held(read, parts)
        return times_transpose(a, ctx.F)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        grad_a = times(g, ctx.F) if ctx.needs_input_grad[0] else None
        return grad_a, None, *(None for _ in ctx.F.parts)


class _FromCoefficients(torch.autograd.Function):
    """base + z F. In one dtype the sum is taken inside the matrix product, before rounding."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, z: Tensor, read: Reader, *parts: Tensor) -> Tensor:
        ctx.F, ctx.dtype = Held(read, parts), z.dtype
        if base.dtype == z.dtype:
            return times(z, ctx.F, base)
        return base + times(z, ctx.F).to(base.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        grad_z = times_transpose(g.to(ctx.dtype), ctx.F) if ctx.needs_input_grad[1] else None
        return g if ctx.needs_input_grad[0] else None, grad_z, None, *(None for _ in ctx.F.parts)


def times_transpose(a: Tensor, F: Held) -> Tensor:
    """a Fᵀ, (tokens, k)."""
    read, parts = F
    out = None
    if torch.is_grad_enabled() and a.requires_grad:  # of a second backward: what is written into ``out`` has none
        return torch.cat([a @ dense.t() for _, dense in read.by_rows(parts, a.dtype)], dim=1)
    for rows, dense in read.by_rows(parts, a.dtype):
        if dense.shape[0] == parts[0].shape[0]:
            return a @ dense.t()
        out = a.new_empty(a.shape[0], parts[0].shape[0]) if out is None else out
        torch.mm(a, dense.t(), out=out[:, rows])
    assert out is not None
    return out


def times(z: Tensor, F: Held, base: Tensor | None = None) -> Tensor:
    """z F, or base + z F, (tokens, n)."""
    read, parts = F
    pieces = []
    for columns, dense in read.by_columns(parts, z.dtype):
        if base is None:
            pieces.append(z @ dense)
        else:
            pieces.append(torch.addmm(base if base.dim() == 1 else base[:, columns], z, dense))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
