"""Cards: what a step needs of one beside its tensors, which it fits, and sizes in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GIB = 2**30
CARDS_GIB: tuple[float, ...] = (8, 12, 16, 24)

CONTEXT_BYTES = 3 * GIB // 4
"""What a process holds on a card beside its tensors: 0.75 GiB.

The CUDA context and the loaded kernels of torch, cuBLAS and bitsandbytes take 0.3 to 0.5 GiB, cuBLAS
workspaces some tens of MiB, a desktop on the same card the rest. Assumed, not measured on a card.
"""

FRAGMENTATION = 0.04
"""Share of the peak that the caching allocator holds beyond the live tensors.

Blocks are split and rounded (to 2 MiB above 1 MiB), and free blocks of the wrong size cannot be used.
Training steps repeat the same sizes, which keeps the share small. Assumed, not measured on a card.
"""


def needed_bytes(peak_bytes: int) -> int:
    """What a card has to have for a peak: the peak, fragmentation and the CUDA context."""
    return peak_bytes + round(FRAGMENTATION * peak_bytes) + CONTEXT_BYTES


def usable_bytes(card_gib: float) -> int:
    """The largest peak that fits a card of ``card_gib`` GiB, up to rounding."""
    return int((card_gib * GIB - CONTEXT_BYTES) / (1 + FRAGMENTATION))


def fits(peak_bytes: int, card_gib: float) -> bool:
    """Whether a peak fits a card of ``card_gib`` GiB, allowance included."""
    return needed_bytes(peak_bytes) <= card_gib * GIB


def unit_of(sizes: Iterable[int]) -> tuple[str, int]:
    """GiB, or MiB where nothing reaches a GiB: the unit's name and its bytes."""
    return ("GiB", GIB) if max(sizes, default=0) >= GIB else ("MiB", 2**20)


def check_cards(cards: Sequence[float], what: str = "card") -> tuple[float, ...]:
    """Card sizes in GiB, each once and in order; whole ones as int.

    Raises:
        ValueError: a size that is no positive number.
    """
    for card in cards:
        if isinstance(card, bool) or not isinstance(card, (int, float)) or not 0 < card < 2**20:
            raise ValueError(f"{what}: expected a size in GiB above 0, got {card!r}")
    return tuple(sorted({int(card) if card == int(card) else card for card in cards}))
