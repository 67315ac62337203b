"""Cards: what a step needs of one beside its tensors, which it fits, and sizes in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GIB = 2**30

CONTEXT_BYTES = 3 * GIB // 4
"""What a process holds on a card beside its tensors: 0.75 GiB.

The CUDA context and the loaded kernels of torch, cuBLAS and bitsandbytes: 0.753 GiB were taken on an H200 with CUDA
13 (benchmarks/results/gpu). A desktop on the same card would come on top.
"""

FRAGMENTATION = 0.08
"""Share of the peak that the caching allocator holds beyond the live tensors.

Blocks are split and rounded (to 2 MiB above 1 MiB), and free blocks of the wrong size cannot be used.
On an H200 whose allocator was held to cards of 8 and 12 GiB, the longest sequences that fitted took 4 to 8 % beyond
the predicted peak (five searches in benchmarks/results/gpu): this is the upper end.
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
