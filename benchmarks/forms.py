"""Rounding error of the paper's two-sided form and of the one-sided forms, against fp64.

    python benchmarks/forms.py [--size 1024] [--json FILE]

A square weight with a spectrum like a language model's (a few large directions, a bulk, a tail close to
zero), bf16 throughout, a banded M with |dW| = 2 % of |W|. Shown are the relative errors of y = W'x and of
the gradient of M against the same map in fp64 with the same factors, so that what is measured is
rounding alone. Square weights are the hard case: only they have singular values near zero.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qsvft.maths.basis import Basis
from qsvft.maths.patterns import Pattern, banded
from qsvft.maths.updates import sparse_update, two_sided_update
from qsvft.storage.factors import make_bases, measured_scale


def language_model_like(size: int, generator: torch.Generator) -> Tensor:
    """A Gaussian matrix plus a decaying low-rank part: bulk, outlier directions and a tail near zero."""
    bulk = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    left, right = (torch.randn(size, 32, generator=generator, dtype=torch.float64) / size**0.5 for _ in range(2))
    strengths = 8.0 / torch.arange(1, 33, dtype=torch.float64) ** 0.7
    return (bulk + left * strengths @ right.T).to(torch.bfloat16)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


Scale = Callable[[Tensor, Tensor], Tensor]


def scales() -> dict[str, Scale | None]:
    def left_out(tau: float) -> Scale:
        return lambda s, rms: torch.where(s < tau * rms, torch.zeros_like(s), 1 / s.clamp_min(1e-12))

    def bounded(tau: float) -> Scale:
        return lambda s, rms: 1 / torch.maximum(s, tau * rms).clamp_min(1e-12)

    return {
        "two-sided": None,
        "one-sided, 1/s unbounded": bounded(0.0),
        "one-sided, bounded, tau 0.03": bounded(0.03),
        "one-sided, bounded, tau 0.1": bounded(0.1),
        "one-sided, directions under 0.03 left out": left_out(0.03),
        "one-sided, directions under 0.1 left out": left_out(0.1),
        "one-sided, N trained directly": lambda s, rms: torch.ones_like(s) / rms,
    }


def measure(size: int, tokens: int, seed: int) -> list[dict[str, float | str]]:
    generator = torch.Generator().manual_seed(seed)
    W = language_model_like(size, generator)
    bases = make_bases(W, size, "both", 16)
    U, V = (bases[side].dense(torch.bfloat16) for side in "UV")
    s, rms = measured_scale(W, bases["V"], "V", size)
    pattern = banded(size, 8)
    unit = torch.randn(pattern.count, generator=generator)
    x = torch.randn(tokens, size, generator=generator).to(torch.bfloat16)
    g = torch.randn(tokens, size, generator=generator).to(torch.bfloat16)
    rows = []
    for name, make in scales().items():
        scale = None if make is None else make(s, rms)

        def run(dtype: torch.dtype, values: Tensor, scale: Tensor | None = scale) -> tuple[Tensor, Tensor]:
            values = values.clone().requires_grad_()
            y = apply(x.to(dtype), W.to(dtype), bases["U"], bases["V"], scale, values, pattern)
            (gradient,) = torch.autograd.grad(y, values, g.to(dtype))
            return y.detach(), gradient

        size_of_update = 0.02 * W.double().norm() / dense_update(W, U, V, scale, unit, pattern).norm()
        values = (unit.double() * size_of_update).float()
        y64, gradient64 = run(torch.float64, values.double())
        y, gradient = run(torch.bfloat16, values)
        rows.append({"form": name, "output": relative(y, y64), "gradient": relative(gradient, gradient64)})
    return rows


def apply(x: Tensor, W: Tensor, U: Basis, V: Basis, scale: Tensor | None, values: Tensor, pattern: Pattern) -> Tensor:
    if scale is None:
        return two_sided_update(x @ W.T, x, U, V, values, pattern)
    return sparse_update(x, x, V, V, values, pattern, scale, "rows") @ W.T


def dense_update(W: Tensor, U: Tensor, V: Tensor, scale: Tensor | None, values: Tensor, pattern: Pattern) -> Tensor:
    M, U, V = pattern.dense(values.double()), U.double(), V.double()
    if scale is None:
        return U.T @ M @ V
    return W.double() @ V.T @ (scale[:, None] * M) @ V


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of the weight")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rows = measure(options.size, options.tokens, options.seed)
    table = Table(title=f"Error against fp64, {options.size} x {options.size}, bf16, |dW| = 2 % of |W|")
    for column in ("form", "error of y", "error of the gradient of M"):
        table.add_column(column)
    for row in rows:
        table.add_row(str(row["form"]), f"{row['output']:.2e}", f"{row['gradient']:.2e}")
    Console(width=110).print(table)
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), **vars(options)}
        about.pop("json")
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
