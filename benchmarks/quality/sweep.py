"""Which run comes next: each method's learning rates around its start, and more seeds at the best.

Rates are the start times powers of two. With the first seed a method runs at its start, then at both neighbours, then
beyond whichever end is best, until the best lies inside of at least four rates. There the other seeds run. A run that
stopped early counts as infinite, and a sweep ends at a rate that is 2**8 from its start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LEAST_RATES = 4
FARTHEST = 8
Losses = Mapping[float, float]


def rate_at(start: float, step: int) -> float:
    """The start times 2**step, in two digits, which is how it is written."""
    return float(f"{start * 2.0**step:.3g}")


def next_rate(start: float, losses: Losses) -> float | None:
    """The next rate of a sweep.

    Args:
        start: where it begins.
        losses: by rate, infinite for a run that stopped early.

    Returns:
        None where the best is inside of at least four rates.
    """
    steps = {step: losses[rate] for step in range(-FARTHEST, FARTHEST + 1) if (rate := rate_at(start, step)) in losses}
    for step in (0, 1, -1):
        if step not in steps:
            return rate_at(start, step)
    best = min(steps, key=lambda step: steps[step])
    below, above = min(steps) - 1, max(steps) + 1
    if best == max(steps):
        step = above
    elif best == min(steps):
        step = below
    elif len(steps) < LEAST_RATES:
        step = above if steps[best + 1] < steps[best - 1] else below
    else:
        return None
    return rate_at(start, step) if abs(step) <= FARTHEST else None


def best_rate(losses: Losses) -> float | None:
    """The rate with the least loss; None where all stopped early."""
    rate = min(losses, key=lambda rate: losses[rate], default=None)
    return rate if rate is not None and math.isfinite(losses[rate]) else None


def next_run(start: float, seeds: Sequence[int], done: Mapping[int, Losses]) -> tuple[float, int] | None:
    """The next rate and seed of a method; None where it has all.

    Args:
        start: where its sweep begins.
        seeds: the first is the sweep's.
        done: losses by rate, by seed.
    """
    losses = done.get(seeds[0], {})
    rate = next_rate(start, losses)
    if rate is not None:
        return rate, seeds[0]
    best = best_rate(losses)
    if best is None:
        return None
    return next(((best, seed) for seed in seeds[1:] if best not in done.get(seed, {})), None)
