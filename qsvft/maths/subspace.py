"""The leading directions of WᵀW without all of its eigenvectors: a block Krylov space from a fixed start.

    K = orth[Ω, G Ω, G² Ω, ...],  G = WᵀW,      Kᵀ G K = E diag(s²) Eᵀ,      V = (K E)ᵀ, the first k rows

G is only applied, to a block at a time, so a weight is read once a block, in whatever pieces it comes. The width
of K is 3 k, and each block is made orthogonal to those before it. (Randomised block Krylov methods: Musco
and Musco, arXiv 1504.05477. Plain block power iteration of the same work keeps more of what it should lose.)

What holds, measured for k <= n/8 and n <= 11008 (``benchmarks/decomposition.py``):

- Rows are orthonormal to 1e-13 in fp64.
- Energy: of what the first k singular values hold, sum s_j² is at least 0.89 on a flat (Marchenko-Pastur) spectrum,
  the worst there is (0.95 at k = 256, n = 4096), and at least 0.99 where it falls like j^-1/4 or faster.
- Reproducible: Ω comes from integer arithmetic, so that V is a smooth function of W. Another order of summation
  moves entries by about 1e-12, far below bf16's rounding.
- Single rows are singular vectors only where those are well separated; the others mix with their neighbours. Nor
  are the first k rows of a larger rank those of rank k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

BLOCKS = 6
"""How often W is read."""

LEAST_BLOCK = 64
"""Columns of a block where k / 2 is less: reading W takes most of the time then."""

_PRIME = 2**31 - 1


def leading_directions(
    product: Callable[[Tensor], Tensor],
    size: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    energy: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Orthonormal directions that hold nearly the most energy of a weight that k directions can.

    Args:
        product: (size, b) -> G times it, (size, b) in ``dtype``; G symmetric, positive semidefinite.
        size: n.
        rank: k, 1 <= k <= n.
        dtype: of the arithmetic, fp64 to be reproducible.
        device: where.
        energy: (size, b) -> Bᵀ G B (b, b), for the last block, where it takes half the work of a product.

    Returns:
        s (k,), the lengths |W v_j|, descending, and the directions as rows (k, n). Signs are not fixed.
    """
    block = min(max(-(-rank // 2), LEAST_BLOCK), size)
    basis = torch.linalg.qr(start(size, 0, block, device).to(dtype))[0]
    products = product(basis)
    inner = basis.T @ products
    while basis.shape[1] < min(BLOCKS * block, size):
        width = basis.shape[1]
        count = min(block, size - width)
        fresh = start(size, width, count, device).to(dtype)
        new = _orthogonal_to(basis, _with_fresh(products[:, width - block : width - block + count], fresh))
        cross = products.T @ new
        if energy is not None and width + count == min(BLOCKS * block, size):
            own = energy(new)
        else:
            products = torch.cat([products, product(new)], 1)
            own = new.T @ products[:, width:]
        basis = torch.cat([basis, new], 1)
        inner = torch.cat([torch.cat([inner, cross], 1), torch.cat([cross.T, own], 1)])
    squares, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    rows = (basis @ vectors.flip(1)[:, :rank]).T
    return squares.flip(0)[:rank].clamp_min(0).sqrt(), rows.contiguous()


def _with_fresh(block: Tensor, fresh: Tensor) -> Tensor:
    """A block with a little of the fixed start: where the range of W is used up, the rest is no rounding noise."""
    size = torch.linalg.matrix_norm(block)
    share = torch.finfo(block.dtype).eps ** 0.5
    return block + fresh * torch.where(size > 0, size * share, torch.ones_like(size))


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of what the block adds to a basis; the second round clears the first one's rounding."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return block


def start(size: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """Columns ``first`` to ``first + count`` of Ω, (size, count) fp64 in [-1/2, 1/2]: a hash of row and column.

    Integers below 2^62 throughout, so that every version gives the same numbers.
    """
    return _start(size, first, count).to(device)


@lru_cache(maxsize=16)  # a model's layers have few sizes
def _start(size: int, first: int, count: int) -> Tensor:
    """The same on the CPU: what is kept there takes nothing of a card that a model is to fit on."""
    row = torch.arange(1, size + 1, dtype=torch.int64, device="cpu").unsqueeze(1)
    column = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device="cpu")
    x = (row * 1_103_515_249 + column * 1_640_531_513) % _PRIME
    for odd in (747_796_405, 1_442_695_041, 1_779_033_703):
        x = x ^ (x >> 15)
        x = x * odd % _PRIME
    return x.to(torch.float64) / _PRIME - 0.5
