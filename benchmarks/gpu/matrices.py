"""Stage "decomposition": the seconds of decomposing a layer's weights, and what a whole model takes.

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
SQUARE = "width x width"
ORDER = ("exact, both sides", "randomized, both sides", "exact, one side", "float32, one side", "randomized, one side")
"""The way that prepare() takes at full rank, that at a small one, and the others."""


def run(suite: Suite) -> None:
    """Time every way; then see whether the CPU gives the same vectors."""
    ways = {way.name: way for way in decomposition.WAYS}
    sizes = suite.plan.matrices
    shapes = decomposition.cases(sizes.width, sizes.width, sizes.inner)
    device = torch.device(suite.device.kind)
    for name in ORDER:
        for matrix in decomposition.LAYER:
            case = f"{STAGE} | {name} | {matrix}"
            if not suite.rows.done(case):
                about = {"way": name, "matrix": matrix, "shape": shapes[matrix]}
                suite.attempt(
                    STAGE, case, about, lambda m=matrix, w=ways[name]: _time(shapes[m], w, sizes.rank, device)
                )
        _extrapolate(suite, name)
    for name in ORDER[:2]:
        case = f"{STAGE} | {name} | the same on the CPU"
        if not suite.rows.done(case):
            about = {"way": name, "shape": shapes[SQUARE]}
            suite.attempt(STAGE, case, about, lambda w=ways[name]: _compare(shapes[SQUARE], w, sizes.rank, device))


def _weight(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return decomposition.make_weight(*shape).to(device)


def _rank(shape: tuple[int, int], way: Way, rank: int) -> int:
    return min(rank, *shape) if way.truncated else min(shape)


def _time(shape: tuple[int, int], way: Way, rank: int, device: torch.device) -> dict[str, Any]:
    weight, k = _weight(shape, device), _rank(shape, way, rank)
    # The first one loads kernels and makes handles; it is kept apart.
    ran = [decomposition.timed(lambda: decomposition.factors_of(weight, k, way), device) for _ in range(1 + REPEATS)]
    factors = ran[-1][0]
    return {
        "rank": k,
        "decompose_s": min(seconds for _, seconds in ran[1:]),
        "runs_s": [seconds for _, seconds in ran],
        "scale_s": decomposition.scale_seconds(weight, factors) if way.sides == "one" else None,
        "orthogonality": decomposition.orthogonality(factors),
        "error": decomposition.truncation_error(weight, factors),
    }


def _compare(shape: tuple[int, int], way: Way, rank: int, device: torch.device) -> dict[str, Any]:
    weight, k = _weight(shape, device), _rank(shape, way, rank)
    here = decomposition.factors_of(weight, k, way)
    equal, changed = decomposition.same_elsewhere(here, decomposition.elsewhere(weight, k, way))
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
        case = f"{STAGE} | {way} | a model"
        if not suite.rows.done(case):
            suite.rows.append(STAGE, case, RAN, layers=layers, **found)
