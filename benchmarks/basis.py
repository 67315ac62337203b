"""The singular and the Hadamard basis side by side: bytes held, time to prepare, time of an adapter's step.

    python benchmarks/basis.py [--size 4096] [--tokens 2048] [--prepare-size 1024] [--json FILE]

One square weight at full rank, bf16 activations, a banded M with 8 off-diagonals. The step is the update
alone, x + V N Vᵀ x, forward and backward; times are medians, and ratios are taken in this run. Preparing (the
fp64 decomposition of the singular basis) is timed on a smaller weight and grows with the cube of its width.
How well the two bases learn is measured by quality/ and training.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from forms import language_model_like
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qsvft.maths.basis import Basis
from qsvft.maths.hadamard import HadamardBasis
from qsvft.maths.patterns import banded
from qsvft.maths.updates import input_side_update
from qsvft.storage.factors import StoredBasis, make_bases, measured_scale
from qsvft.storage.stored_matrix import StoredMatrix

HELD = {"singular, bf16": 16, "singular, int8": 8, "singular, NF4": 4, "hadamard": None}


def make_basis(bits: int | None, size: int) -> Basis:
    """Bytes and time do not depend on the values, so that any rows stand for singular vectors."""
    if bits is None:
        return HadamardBasis(size, size, 0)
    rows = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5
    return StoredBasis(StoredMatrix.hold(rows, bits))


def held_bytes(basis: Basis) -> int:
    assert isinstance(basis, nn.Module)
    return sum(b.numel() * b.element_size() for b in basis.buffers())


def step_time(basis: Basis, tokens: int, repeats: int) -> float:
    """Seconds of forward and backward of the update, the median."""
    size = basis.size
    pattern = banded(size, 8)
    values = (torch.randn(pattern.count) / size).requires_grad_()
    scale = torch.ones(size)
    x = torch.randn(tokens, size).bfloat16().requires_grad_()
    g = torch.randn(tokens, size).bfloat16()

    def step() -> None:
        input_side_update(x, x, basis, scale, values, pattern).backward(g)

    step()
    return statistics.median(timed(step) for _ in range(repeats))


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def prepare_time(bits: int | None, weight: Tensor) -> float:
    """Seconds to make the basis of a weight and to measure its scale."""
    size = weight.shape[1]

    def prepare() -> None:
        basis = HadamardBasis(size, size, 0) if bits is None else make_bases(weight, size, "one", bits)["V"]
        measured_scale(weight, basis, "V", size)

    return timed(prepare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prepare-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    weight = language_model_like(options.prepare_size, torch.Generator().manual_seed(0)).float()
    rows = []
    for name, bits in HELD.items():
        basis = make_basis(bits, options.size)
        seconds = step_time(basis, options.tokens, options.repeats)
        figures = {"bytes": held_bytes(basis), "step_s": seconds, "prepare_s": prepare_time(bits, weight)}
        rows.append({"basis": name, **figures})
    reference = rows[0]["step_s"]
    table = Table(title=f"{options.size} x {options.size}, {options.tokens} tokens, {torch.get_num_threads()} threads")
    preparing = f"prepare {options.prepare_size} x {options.prepare_size}, s"
    for column in ("basis", "MiB held", "step, s", "times bf16", preparing):
        table.add_column(column, justify="right" if column != "basis" else "left")
    for row in rows:
        cells = (f"{row['bytes'] / 2**20:.3f}", f"{row['step_s']:.3f}", f"{row['step_s'] / reference:.2f}")
        table.add_row(str(row["basis"]), *cells, f"{row['prepare_s']:.2f}")
    Console(width=110).print(table)
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), **vars(options)}
        about.pop("json")
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
