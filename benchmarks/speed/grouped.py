"""The coefficients of a group of layers that read one x (q, k, v; gate, up): a product each, or one product of all.

    h_i = V_iᵀ x, each V_i n x k        against        [h_1; h_2; ...] = [V_1 V_2 ...]ᵀ x, and the same of gradients

What it could save is the difference of the two; what it costs, in an adapted model, is that layers know of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from bench import Bench
from clock import summary
from sizes import one_layer

STAGE = "grouped"
ONE_EACH, ONE_OF_ALL = "a product each", "one product of all"
RANK = 128
GROUPS = {"q, k, v": 3, "gate, up": 2}


def run(bench: Bench, models: Sequence[str], tokens: Sequence[int]) -> None:
    """Every group at the widths of every model."""
    for model in models:
        width = one_layer(model).hidden_size
        for group, members in GROUPS.items():
            for count in tokens:
                case = f"{STAGE} | {model}, {width} wide | {group} | {count} tokens"
                bench.attempt(STAGE, case, lambda args=(width, members, count): _times(bench, *args))


def _times(bench: Bench, width: int, members: int, tokens: int) -> dict[str, Any]:
    new = partial(torch.randn, dtype=torch.bfloat16, device=bench.device)
    x, V = new(tokens, width), [new(width, RANK) for _ in range(members)]
    side_by_side, gradients = torch.cat(V, 1), new(tokens, members * RANK)
    apart = [part.contiguous() for part in gradients.split(RANK, 1)]
    # The base's gradients, one a layer; each is added to by the last product, as in maths/dense_update.py.
    base = [new(tokens, width) for _ in range(members)]
    steps: dict[str, Callable[[], Any]] = {
        ONE_EACH: lambda: (
            [x @ one for one in V],
            [into.addmm_(g, one.T) for into, g, one in zip(base, apart, V, strict=True)],
        ),
        ONE_OF_ALL: lambda: ((x @ side_by_side).split(RANK, 1), base[0].addmm_(gradients, side_by_side.T)),
    }
    return {"unit": ONE_EACH, "methods": summary(bench.time(steps), ONE_EACH), "refused": {}}
