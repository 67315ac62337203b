"""Rounding of singular vectors: bf16, int8 (linear and bitsandbytes' dynamic map) and NF4, against fp64.

    python benchmarks/factor_bits.py [--minilm DIR] [--size 1024] [--json FILE]

For each way of holding U and V: bytes an entry, the error of the vectors, the error of dW = U M Vᵀ with a
banded M in the two-sided form, and that of the one-sided form W V S⁻¹ M Vᵀ with s as the singular values
and with s measured on the rounded vectors. Weights: a synthetic matrix with a spectrum like a language
model's, and with ``--minilm`` (the directory of a BERT checkpoint) real ones, averaged over its layers.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from forms import language_model_like, relative
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from qsvft.maths.decomposition import decompose
from qsvft.maths.patterns import banded
from qsvft.storage.stored_matrix import StoredMatrix

Rounding = Callable[[Tensor], tuple[Tensor, float]]


def stored(bits: int) -> Rounding:
    def rounding(rows: Tensor) -> tuple[Tensor, float]:
        held = StoredMatrix.hold(rows, bits)
        return held.dense(torch.float64), held.nbytes / rows.numel()

    return rounding


def dynamic_map(rows: Tensor) -> tuple[Tensor, float]:
    """bitsandbytes' 8-bit map in blocks of 64, its maxima in fp32."""
    codes, state = bnb.quantize_blockwise(rows.float(), blocksize=64)
    return bnb.dequantize_blockwise(codes, state).double(), 1 + 4 / 64


def nf4_in_blocks_of_64(rows: Tensor) -> tuple[Tensor, float]:
    """bitsandbytes' own double quantisation."""
    codes, state = bnb.quantize_4bit(rows.float(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state).double(), 1 / 2 + 1 / 64 + 4 / (64 * 256)


WAYS: dict[str, Rounding] = {
    "bf16": stored(16),
    "int8, linear (held so)": stored(8),
    "int8, bitsandbytes' dynamic map": dynamic_map,
    "NF4, blocks of 128 (held so)": stored(4),
    "NF4, blocks of 64, bitsandbytes": nf4_in_blocks_of_64,
}


def measure(W: Tensor) -> dict[str, list[float]]:
    """[bytes an entry, error of V, of dW two-sided, of dW one-sided with s_j, with |W v_j|] for each way."""
    W = W.double() if W.shape[0] >= W.shape[1] else W.double().T
    k = W.shape[1]
    parts = decompose(W, k, "both")
    assert parts.U is not None and parts.V is not None
    pattern = banded(k, 8)
    M = pattern.dense(torch.randn(pattern.count, generator=torch.Generator().manual_seed(0)).double())
    exact = parts.U.T @ M @ parts.V
    # The bounded scale of the library; small directions would drown the comparison.
    floor = 0.1 * parts.s.square().mean().sqrt()
    bounded = parts.U.T @ ((parts.s / parts.s.clamp_min(floor))[:, None] * M) @ parts.V
    found = {}
    for name, rounding in WAYS.items():
        (U, _), (V, nbytes) = rounding(parts.U), rounding(parts.V)
        measured = torch.linalg.vector_norm(W @ V.T, dim=0)
        one_sided = [W @ V.T @ (M / s.clamp_min(floor)[:, None]) @ V for s in (parts.s, measured)]
        errors = [relative(V, parts.V), relative(U.T @ M @ V, exact), *(relative(dW, bounded) for dW in one_sided)]
        found[name] = [nbytes, *errors]
    return found


def minilm_weights(folder: Path) -> list[Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return [t for name, t in tensors.items() if "encoder.layer" in name and t.dim() == 2]


def mean(tables: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    columns = {name: zip(*(table[name] for table in tables), strict=True) for name in tables[0]}
    return {name: [sum(values) / len(tables) for values in found] for name, found in columns.items()}


def show(title: str, rows: dict[str, list[float]]) -> Table:
    table = Table(title=title)
    for column in ("held as", "bytes an entry", "error of V", "of dW, two-sided", "one-sided, 1/s_j", "1/|W v_j|"):
        table.add_column(column)
    for name, (nbytes, *errors) in rows.items():
        table.add_row(name, f"{nbytes:.3f}", *(f"{error:.2%}" for error in errors))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of the synthetic weight")
    parser.add_argument("--minilm", type=Path, help="directory with a BERT checkpoint's model.safetensors")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    synthetic = language_model_like(options.size, torch.Generator().manual_seed(0))
    tables = {f"synthetic, {options.size} x {options.size}": measure(synthetic)}
    if options.minilm:
        weights = minilm_weights(options.minilm)
        tables[f"MiniLM, mean over {len(weights)} weights"] = mean([measure(W) for W in weights])
    for title, rows in tables.items():
        Console(width=130).print(show(title, rows))
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        options.json.write_text(json.dumps({"about": about, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    main()
