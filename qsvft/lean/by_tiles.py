"""What acts on each token by itself, taken in tiles over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

TOKENS = 2048
"""Of a tile, over all rows of a batch."""

Tile = tuple[Any, ...]


def tiles(x: Tensor) -> Iterator[Tile]:
    """Where each tile is in x (..., tokens, width): stretches of tokens, of all rows of a batch."""
    length = max(1, TOKENS * x.shape[-2] * x.shape[-1] // x.numel())
    for start in range(0, x.shape[-2], length):
        yield (..., slice(start, start + length), slice(None))


def fits_a_tile(x: Tensor) -> bool:
    """Whether there is nothing to divide."""
    return x.dim() < 2 or x.numel() <= TOKENS * x.shape[-1]


def by_tiles(x: Tensor, run: Callable[[Tile], Tensor]) -> Tensor:
    """What run gives for each tile of x (..., tokens, width), put together: (..., tokens, its own width)."""
    if fits_a_tile(x):
        return run((...,))
    y = None
    for tile in tiles(x):
        part = run(tile)
        y = part.new_empty(*x.shape[:-1], part.shape[-1]) if y is None else y
        y[tile] = part
    assert y is not None
    return y
