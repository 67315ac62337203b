"""Stage (d): the seconds of decomposing a layer's weights, and what a whole model takes.

The ways and what is measured of them are benchmarks/decomposition.py's.
Shapes are a Llama's with q, k and v as wide as the model. Reading quantised weights back is not in the seconds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from results import RAN, ROOT
from suite import Suite

sys.path.insert(0, str(ROOT / "benchmarks"))
import decomposition
from decomposition import Way

STAGE = "decomposition"
REPEATS = 2
SQUARE, WIDE = "width x width", "width x inner"
SHARED = (SQUARE, WIDE, "q, k, v", "gate, up")
ALONE = (SQUARE, WIDE, "inner x width")
ORDER = {
    "exact, one side": SHARED,
    "randomized, one side": SHARED,
    "exact, both sides": ALONE,
    "float32, one side": SHARED,
    "randomized, both sides": ALONE,
}
"""The way that prepare() takes at full rank, that at a small one, and the others, each with its matrices."""


def run(suite: Suite) -> None:
    """Time every way; then see whether the CPU gives the same vectors."""
    ways = {way.name: way for way in decomposition.WAYS}
    sizes = suite.plan.matrices
    shapes = decomposition.cases(sizes.width, sizes.width, sizes.inner)
    device = torch.device(suite.device.kind)
    for name, matrices in ORDER.items():
        for matrix in matrices:
            case = f"{STAGE} | {name} | {matrix}"
            if not suite.rows.done(case):
                about = {"way": name, "matrix": matrix, "shapes": shapes[matrix]}
                suite.attempt(
                    STAGE, case, about, lambda m=matrix, w=ways[name]: _time(shapes[m], w, sizes.rank, device)
                )
        _extrapolate(suite, name)
    for name in list(ORDER)[:2]:
        case = f"{STAGE} | {name} | the same on the CPU"
        if not suite.rows.done(case):
            about = {"way": name, "shapes": shapes[SQUARE]}
            suite.attempt(STAGE, case, about, lambda w=ways[name]: _compare(shapes[SQUARE], w, sizes.rank, device))


def _weights(shapes: list[tuple[int, int]], device: torch.device) -> list[torch.Tensor]:
    return [decomposition.make_weight(*shape, seed=i).to(device) for i, shape in enumerate(shapes)]


def _rank(shapes: list[tuple[int, int]], way: Way, rank: int) -> int:
    limit = min(sum(m for m, _ in shapes), shapes[0][1])
    return min(rank, limit) if way.truncated else limit


def _time(shapes: list[tuple[int, int]], way: Way, rank: int, device: torch.device) -> dict[str, Any]:
    weights, k = _weights(shapes, device), _rank(shapes, way, rank)
    # The first one loads kernels and makes handles; it is kept apart.
    ran = [decomposition.timed(lambda: decomposition.factors_of(weights, k, way), device) for _ in range(1 + REPEATS)]
    factors = ran[-1][0]
    return {
        "rank": k,
        "decompose_s": min(seconds for _, seconds in ran[1:]),
        "runs_s": [seconds for _, seconds in ran],
        "scale_s": decomposition.scale_seconds(weights, factors) if way.sides == "one" else None,
        "orthogonality": decomposition.orthogonality(factors),
        "error": decomposition.truncation_error(weights, factors),
    }


def _compare(shapes: list[tuple[int, int]], way: Way, rank: int, device: torch.device) -> dict[str, Any]:
    weights, k = _weights(shapes, device), _rank(shapes, way, rank)
    here = decomposition.factors_of(weights, k, way)
    equal, changed = decomposition.same_elsewhere(here, decomposition.elsewhere(weights, k, way))
    return {"rank": k, "bf16_equal": equal, "map_change": changed}


def _extrapolate(suite: Suite, way: str) -> None:
    """Minutes for all layers of a model, of what was timed."""
    layers = suite.plan.matrices.layers
    rows = [
        {**row, "seconds": row["decompose_s"]}
        for row in suite.rows.of(STAGE)
        if row["status"] == RAN and row["way"] == way and "decompose_s" in row
    ]
    for found in decomposition.model_minutes(rows, layers):
        case = f"{STAGE} | {way} | a model, {found['inputs']}"
        if not suite.rows.done(case):
            suite.rows.append(STAGE, case, RAN, layers=layers, **found)
