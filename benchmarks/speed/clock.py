"""The clock: things that take turns in one process, round by round, so that a ratio is taken within a round.

A machine is slower for a while, or another process runs: that hits a round, and every ratio is of two times out of one
round. Who begins moves on by one each round, so that nobody always comes behind the same other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import quantiles
from typing import Any

import torch

LEAST = 3
"""Rounds that are always run, however long they take: below that there is no spread."""

Times = dict[str, list[float]]


def interleaved(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    seconds: float = float("inf"),
    warmup: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Times:
    """Milliseconds of each thing, one number a round.

    Args:
        steps: what is timed, by name.
        rounds: how many at most, at least 3.
        device: "cpu" or "cuda", which is waited for before and after each.
        seconds: no round begins later than this after the first one, but for the first three.
        warmup: calls of each before the first round.
        progress: around the numbers of the rounds, such as a progress bar.

    Raises:
        ValueError: fewer than 3 rounds, or nothing to time.
    """
    if rounds < LEAST:
        raise ValueError(f"found {rounds} rounds; expected at least {LEAST}, or there is no spread")
    if not steps:
        raise ValueError("nothing to time; expected at least one step")
    names = list(steps)
    for _ in range(warmup):
        for name in names:
            _taken(steps[name], device)
    times: Times = {name: [] for name in names}
    started = time.perf_counter()
    for number in progress(range(rounds)):
        if number >= LEAST and time.perf_counter() - started > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_taken(steps[name], device))
    return times


def _taken(step: Callable[[], Any], device: str) -> float:
    _wait(device)
    started = time.perf_counter()
    step()
    _wait(device)
    return 1000 * (time.perf_counter() - started)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[4], tenths[1], tenths[7]


def ratios(times: Times, unit: str) -> Times:
    """Each thing's time in units of another's in the same round."""
    return {name: [a / b for a, b in zip(taken, times[unit], strict=True)] for name, taken in times.items()}


def summary(times: Times, unit: str) -> dict[str, dict[str, float]]:
    """Of each thing the times' median and spread in milliseconds, and those of its ratios to the unit."""
    found = {}
    for name, of_round in ratios(times, unit).items():
        (median, low, high), (ratio, ratio_low, ratio_high) = spread(times[name]), spread(of_round)
        found[name] = {"median_ms": median, "p20_ms": low, "p80_ms": high}
        found[name] |= {"ratio": ratio, "ratio_p20": ratio_low, "ratio_p80": ratio_high}
    return found
