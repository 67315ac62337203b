"""Time and accuracy of each way to decompose a weight, and what a whole model takes.

    python benchmarks/decomposition.py [--width 4096] [--inner 11008] [--rank 256] [--device cuda] [--json FILE]
    python benchmarks/decomposition.py --quick

The matrices of a Llama layer (width x width, inner x width, width x inner) and a small square one; bf16, with a bulk, a
few large directions and a tail. Shown are:

- seconds, wall time, and beside it that of measuring the scale |W v_j| of the bf16 vectors (one-sided form);
- orthogonality, the largest entry of |V Vᵀ - I| (of both factors where there are two);
- the error of the weight truncated to the rank, over the least possible (at full rank the error itself);
- whether the vectors come out the same elsewhere: the same matrix with one thread (with ``--device cuda``: on the
  CPU), the share of bf16 entries that are equal, and the change of a banded map Vᵀ M V of bf16 vectors.

Then the energy that randomized directions hold, of what is possible, for several spectra; and the minutes for all
layers of a model, from the seconds above. Reading quantised weights back is not in them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qsvft.maths.decomposition import EXACT, Decomposer, decompose, small_side
from qsvft.maths.patterns import banded
from qsvft.maths.subspace import leading_directions
from qsvft.storage.factors import StoredBasis, measured_scale
from qsvft.storage.stored_matrix import StoredMatrix

FLOAT32 = Decomposer(dtype=torch.float32)
RANDOMIZED = Decomposer(randomized=True)
RANDOMIZED_FLOAT32 = Decomposer(randomized=True, dtype=torch.float32)


@dataclass(frozen=True)
class Way:
    """A method with a form; ``truncated`` is at --rank, else at full rank."""

    name: str
    method: Decomposer
    sides: str
    truncated: bool


WAYS = (
    Way("exact, one side", EXACT, "one", False),
    Way("exact, both sides", EXACT, "both", False),
    Way("exact, both sides, truncated", EXACT, "both", True),
    Way("randomized, one side", RANDOMIZED, "one", True),
    Way("randomized, both sides", RANDOMIZED, "both", True),
    Way("float32, one side", FLOAT32, "one", False),
    Way("float32, both sides", FLOAT32, "both", False),
    Way("float32 randomized, one side", RANDOMIZED_FLOAT32, "one", True),
)
LAYER = {"width x width": 4, "inner x width": 2, "width x inner": 1}
"""How many of each matrix a layer of a Llama has."""


def cases(small: int, width: int, inner: int) -> dict[str, tuple[int, int]]:
    return {
        "small": (small, small),
        "width x width": (width, width),
        "inner x width": (inner, width),
        "width x inner": (width, inner),
    }


def make_weight(m: int, n: int) -> Tensor:
    """Like a language model's: a Gaussian matrix plus a decaying low-rank part, bf16."""
    generator = torch.Generator().manual_seed(0)
    few = min(32, m, n)
    bulk = torch.randn(m, n, generator=generator) / max(m, n) ** 0.5
    left, right = (torch.randn(size, few, generator=generator) / size**0.5 for size in (m, n))
    return (bulk + left * (8.0 / torch.arange(1, few + 1) ** 0.7) @ right.T).bfloat16()


def timed(run: Any, device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


Factors = dict[str, Tensor]


def factors_of(weight: Tensor, rank: int, way: Way) -> Factors:
    """ "U" and "V" as rows, where the form has them."""
    parts = decompose(weight, rank, "both" if way.sides == "both" else "one", way.method)
    return {side: rows for side, rows in (("U", parts.U), ("V", parts.V)) if rows is not None}


def elsewhere(weight: Tensor, rank: int, way: Way) -> Factors:
    """The same with one thread; for a weight on another device, on the CPU."""
    threads = torch.get_num_threads()
    if weight.device.type != "cpu":
        return factors_of(weight.cpu(), rank, way)
    torch.set_num_threads(1)
    try:
        return factors_of(weight, rank, way)
    finally:
        torch.set_num_threads(threads)


def orthogonality(factors: Factors) -> float:
    worst = 0.0
    for rows in factors.values():
        R = rows.double()
        worst = max(worst, float((R @ R.T - torch.eye(len(R), dtype=R.dtype, device=R.device)).abs().max()))
    return worst


def truncation_error(weight: Tensor, factors: Factors) -> float:
    """|W - W VᵀV| / |W|, or |W - UᵀU W| / |W|; with both factors |W - UᵀU W VᵀV| / |W|."""
    W = kept = weight.double()
    if "V" in factors:
        kept = (kept @ factors["V"].double().T) @ factors["V"].double()
    if "U" in factors:
        kept = factors["U"].double().T @ (factors["U"].double() @ kept)
    return float((W - kept).norm() / W.norm())


def same_elsewhere(here: Factors, there: Factors) -> tuple[float, float]:
    """The share of bf16 entries that are equal, and the change of a banded map of bf16 vectors."""
    equal, changed = 1.0, 0.0
    for side, rows in here.items():
        one, other = (A.bfloat16().cpu() for A in (rows, there[side]))
        equal = min(equal, float((one == other).double().mean()))
        pattern = banded(len(one), min(8, len(one) - 1))
        M = pattern.dense(torch.randn(pattern.count, generator=torch.Generator().manual_seed(0)))
        first, second = (A.float().T @ M @ A.float() for A in (one, other))
        changed = max(changed, float((second - first).norm() / first.norm()))
    return equal, changed


def scale_seconds(weight: Tensor, factors: Factors) -> float:
    ((side, rows),) = factors.items()
    basis = StoredBasis(StoredMatrix.hold(rows, 16))
    return timed(lambda: measured_scale(weight, basis, side, len(rows)), weight.device)[1]


def least_errors(weight: Tensor) -> Tensor:
    """The least error of any rank k, at index k - 1."""
    W = weight.double()
    squares = torch.linalg.eigvalsh(W @ W.T if small_side(W.shape) == "output" else W.T @ W).flip(0).clamp_min(0)
    return (1 - squares.cumsum(0) / squares.sum()).clamp_min(0).sqrt()


def measure(name: str, shape: tuple[int, int], rank: int, device: torch.device) -> list[dict[str, Any]]:
    weight = make_weight(*shape).to(device)
    limit, least = min(shape), least_errors(weight)
    rows = []
    for way in WAYS:
        k = min(rank, limit) if way.truncated else limit
        factors, seconds = timed(lambda way=way, k=k: factors_of(weight, k, way), device)
        equal, changed = same_elsewhere(factors, elsewhere(weight, k, way))
        error = truncation_error(weight, factors)
        rows.append(
            {
                "matrix": name,
                "shape": shape,
                "way": way.name,
                "rank": k,
                "seconds": seconds,
                "scale_s": scale_seconds(weight, factors) if way.sides == "one" else None,
                "orthogonality": orthogonality(factors),
                "error": error,
                "error_over_least": error / float(least[k - 1]) if k < limit else None,
                "bf16_equal": equal,
                "map_change": changed,
            }
        )
    return rows


def spectra(size: int) -> dict[str, Tensor]:
    """s_j of several spectra; the flat one is a square Gaussian matrix's."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    found = {f"j^-{exponent}": index**-exponent for exponent in (0.25, 0.5, 1.0)}
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"flat (Marchenko-Pastur)": torch.linalg.svdvals(gaussian), **found}


def energies(size: int, ranks: list[int]) -> list[dict[str, Any]]:
    """What randomized directions hold of the most that as many directions can, and the worst single one.

    The start is generic, so that a diagonal weight stands for all with its singular values.
    """
    rows = []
    for name, s in spectra(size).items():
        for rank in ranks:

            def product(block: Tensor, s: Tensor = s) -> Tensor:
                return s.square().unsqueeze(1) * block

            found = leading_directions(product, size, rank, torch.float64, torch.device("cpu"))[0].square()
            best = s[:rank].square()
            share, worst = float(found.sum() / best.sum()), float((found / best).min())
            rows.append({"spectrum": name, "size": size, "rank": rank, "energy": share, "worst": worst})
    return rows


def model_minutes(rows: list[dict[str, Any]], layers: int) -> list[dict[str, Any]]:
    """Minutes for all layers, with the scale in the one-sided form."""
    found = []
    for way in WAYS:
        seconds = {row["matrix"]: row["seconds"] + (row["scale_s"] or 0) for row in rows if row["way"] == way.name}
        if LAYER.keys() <= seconds.keys():
            minutes = layers * sum(count * seconds[matrix] for matrix, count in LAYER.items()) / 60
            found.append({"way": way.name, "minutes": minutes})
    return found


def show(rows: list[dict[str, Any]], about: dict[str, Any]) -> Table:
    table = Table(title=f"{about['device']}, {about['threads']} threads, torch {about['torch']}")
    headings = (
        "matrix",
        "way",
        "rank",
        "s",
        "scale, s",
        "|V Vᵀ - I|",
        "error",
        "over least",
        "bf16 equal",
        "map moves",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("matrix", "way") else "right")
    for row in rows:
        table.add_row(
            "{} x {}".format(*row["shape"]),
            row["way"],
            str(row["rank"]),
            f"{row['seconds']:.2f}",
            "" if row["scale_s"] is None else f"{row['scale_s']:.2f}",
            f"{row['orthogonality']:.0e}",
            f"{row['error']:.2g}",
            "" if row["error_over_least"] is None else f"{row['error_over_least']:.4f}",
            f"{row['bf16_equal']:.4%}",
            f"{row['map_change']:.0e}",
        )
    return table


def simple(title: str, rows: list[dict[str, Any]], formats: dict[str, str]) -> Table:
    table = Table(title=title)
    for heading in formats:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(format(row[key], spec) for key, spec in formats.items()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1024, help="size of the small square weight")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=256, help="of the truncated ways")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="an eighth of each size")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.quick:
        for name in ("small", "width", "inner", "rank"):
            setattr(options, name, getattr(options, name) // 8)
    device = torch.device(options.device)
    machine = platform.processor() or platform.machine()
    about = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine,
        "threads": torch.get_num_threads(),
        **{key: value for key, value in vars(options).items() if key not in ("json", "device")},
    }
    console, rows = Console(width=150), []
    matrices = cases(options.small, options.width, options.inner)
    for name, shape in matrices.items():
        Console(stderr=True).print(f"{name}: {shape} ...", highlight=False)
        rows += measure(name, shape, options.rank, device)
    held = energies(options.width, [max(options.rank // 8, 1), max(options.rank // 2, 1), options.rank])
    minutes = model_minutes(rows, options.layers)
    console.print(show(rows, about))
    title = "Energy of randomized directions, of what as many directions can hold"
    console.print(simple(title, held, {"spectrum": "", "size": "d", "rank": "d", "energy": ".5f", "worst": ".4f"}))
    title = f"A model of {options.layers} layers, width {options.width}, inner {options.inner}"
    console.print(simple(title, minutes, {"way": "", "minutes": ".1f"}))
    if options.json:
        figures = {"about": about, "rows": rows, "energies": held, "model_minutes": minutes}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
