"""HadamardBasis: orthonormal directions from a seed, by random signs and a fast Walsh-Hadamard transform.

    F = P H D        D random signs, H orthonormal Walsh-Hadamard, P picks k of the n rows

Nothing is decomposed and no factor is held; an adapter on it is portable by its seed. H is block
diagonal, with the powers of two of n's binary expansion as blocks (11008 = 8192 + 2048 + 512 + 256).
A block of 2^p is a Kronecker product of matrices of at most 64 x 64, applied one after the other:
2 n (64 + 64) operations a token for n = 4096, in place of 2 n² for a stored factor.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from .basis import Basis

_LARGEST = 64


class HadamardBasis(nn.Module, Basis):
    """k of n Walsh-Hadamard directions with random signs. See :mod:`qsvft.maths.basis` for the maps.

    Args:
        size: n.
        rank: k; below n, which k rows is drawn from the seed too.
        seed: decides signs and rows, in the same way on every machine.
        device: where the small tables live.
    """

    signs: Tensor
    table: Tensor
    rows: Tensor | None

    def __init__(self, size: int, rank: int, seed: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.seed, self._rank = seed, rank
        draw = random.Random(f"{seed}:{size}")
        signs = [1 - 2 * draw.getrandbits(1) for _ in range(size)]
        rows = None if rank == size else torch.tensor(draw.sample(range(size), rank), device=device)
        self.register_buffer("signs", torch.tensor(signs, dtype=torch.int8, device=device), persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("table", _sylvester(_LARGEST, device), persistent=False)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self.signs.shape[0]

    def to_coefficients(self, a: Tensor, rank: int) -> Tensor:
        h: Tensor = _ToCoefficients.apply(a, self.signs, self.table, self.rows)
        return h[:, :rank]

    def from_coefficients(self, base: Tensor, z: Tensor) -> Tensor:
        update: Tensor = _FromCoefficients.apply(z, self.signs, self.table, self.rows)
        return base + update.to(base.dtype)

    def dense(self, dtype: torch.dtype, rank: int | None = None) -> Tensor:
        unit = torch.eye(self.size, dtype=dtype, device=self.signs.device)
        return self.to_coefficients(unit, self.rank)[:, :rank].t()

    def extra_repr(self) -> str:
        return f"size={self.size}, rank={self.rank}, seed={self.seed}"


class _ToCoefficients(torch.autograd.Function):
    """h = P H D a, a row each. Linear: keeps nothing but the tables."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, signs: Tensor, table: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(signs, table, rows)
        return _coefficients(a, signs, table, rows)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _expanded(g, *ctx.saved_tensors), None, None, None


class _FromCoefficients(torch.autograd.Function):
    """D H Pᵀ z, the transpose of the other."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, signs: Tensor, table: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(signs, table, rows)
        return _expanded(z, signs, table, rows)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _coefficients(g, *ctx.saved_tensors), None, None, None


def _coefficients(a: Tensor, signs: Tensor, table: Tensor, rows: Tensor | None) -> Tensor:
    h = walsh_hadamard(a * signs.to(a.dtype), table)
    return h if rows is None else h[:, rows]


def _expanded(z: Tensor, signs: Tensor, table: Tensor, rows: Tensor | None) -> Tensor:
    if rows is not None:
        z = z.new_zeros(z.shape[0], signs.shape[0]).index_copy(1, rows, z)
    return walsh_hadamard(z, table) * signs.to(z.dtype)


def walsh_hadamard(x: Tensor, table: Tensor) -> Tensor:
    """H x for each row of x (tokens, n), block by block. Symmetric and orthonormal.

    Args:
        x: (tokens, n), any floating dtype.
        table: the 64 x 64 Walsh-Hadamard matrix with entries +1 and -1, int8.
    """
    table = table.to(x.dtype)
    pieces = [_one_block(piece, table) for piece in x.split(blocks_of(x.shape[1]), dim=1)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def blocks_of(size: int) -> list[int]:
    """The powers of two that add up to a size, the largest first."""
    return [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]


def _one_block(x: Tensor, table: Tensor) -> Tensor:
    tokens, size = x.shape
    halvings = 0
    for factor in _factors_of(size):
        # The first axis of the product moves to the end, so that after all of them the order is the old one.
        turned = x.reshape(tokens, factor, size // factor).transpose(1, 2)
        halved = (factor.bit_length() - 1) // 2
        # Scaled by powers of two on the way: exact, and no overflow in fp16.
        x = (turned @ (table[:factor, :factor] * 0.5**halved)).reshape(tokens, size)
        halvings += 2 * halved
    left_over = size.bit_length() - 1 - halvings
    return x * 0.5 ** (left_over / 2) if left_over else x


def _factors_of(size: int) -> list[int]:
    """A power of two as factors of at most 64 each."""
    factors = []
    while size > 1:
        factors.append(min(size, _LARGEST))
        size //= factors[-1]
    return factors


def _sylvester(size: int, device: torch.device | None) -> Tensor:
    """The Walsh-Hadamard matrix of a power of two; its leading blocks are the smaller ones."""
    matrix = torch.ones(1, 1, dtype=torch.int8, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
