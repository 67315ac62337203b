"""Residual quantisation: the error of the base weight, and what it does to a model before any training.

    python benchmarks/residual.py [--minilm DIR] [--size 1024] [--texts 100] [--json FILE]

W = NF4(W - U_k S V_kᵀ) + U_k S V_kᵀ with U_k, V_k held in bf16, int8 or NF4, against NF4 alone. Weights:
a synthetic one with a spectrum like a language model's and, with ``--minilm`` (the directory of a BERT
checkpoint), real ones, averaged over its layers. The loss is that of the shipped model (examples/base-model)
on text, in nats a token, before and after its linears are held so.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from factor_bits import minilm_weights
from forms import language_model_like, relative
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vocabulary import finetune, logits_and_loss, text_batches

import qsvft
from qsvft.storage.residual import residual_linear
from qsvft.storage.weights import dense_weight

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
BITS = {16: "bf16", 8: "int8", 4: "NF4"}


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def error(layer: nn.Module, weight: Tensor) -> float:
    held = dense_weight(layer)
    assert held is not None
    return relative(held, weight.double())


def errors(weight: Tensor) -> dict[str, float]:
    """The relative error of the weight by the way it is held."""
    found = {"NF4 alone": error(qsvft.quantize(nn.Sequential(linear(weight)), 4, progress=False)[0], weight)}
    for share in SHARES:
        rank = round(share * min(weight.shape))
        for bits, name in BITS.items():
            found[f"{share:g} of the rank, {name}"] = error(residual_linear(linear(weight), rank, bits), weight)
    return found


def losses(texts: int) -> dict[str, float]:
    """The shipped model's loss on so many texts by the way its linears are held, M = 0."""
    text = text_batches(texts, 0)

    def model() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(finetune.BASE_MODEL, dtype=torch.bfloat16).eval()

    full = layer_ranks(model())
    found = {
        "bf16": logits_and_loss(model(), text)[1],
        "NF4 alone": logits_and_loss(qsvft.quantize(model(), 4, progress=False), text)[1],
    }
    for share in track(SHARES, description="losses", console=Console(stderr=True)):
        for bits, name in BITS.items():
            ranks = {part: round(share * size) for part, size in full.items()}
            options = {"sides": "both", "residual": True, "factor_bits": bits, "rank_pattern": ranks}
            prepared = qsvft.prepare(model(), bits=4, progress=False, pattern="plain", **options).eval()
            found[f"{share:g} of the rank, {name}"] = logits_and_loss(prepared, text)[1]
    return found


def layer_ranks(model: nn.Module) -> dict[str, int]:
    """The full rank of each kind of layer, by the last part of its name."""
    layers = {n.rpartition(".")[2]: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: min(m.weight.shape) for name, m in layers.items() if name != "lm_head"}


def show(tables: dict[str, dict[str, float]], after: dict[str, float]) -> Table:
    table = Table(title="Error of the base weight, and the shipped model's loss before any training")
    table.add_column("held as")
    for title in (*tables, "loss", "change"):
        table.add_column(title, justify="right")
    table.add_row("bf16", *("" for _ in tables), f"{after['bf16']:.4f}", "")
    for name in next(iter(tables.values())):
        cells = [f"{rows[name]:.2%}" for rows in tables.values()]
        table.add_row(name, *cells, f"{after[name]:.4f}", f"{after[name] - after['bf16']:+.4f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of the synthetic weight")
    parser.add_argument("--minilm", type=Path, help="directory with a BERT checkpoint's model.safetensors")
    parser.add_argument("--texts", type=int, default=100, help="texts of 128 tokens that the loss is on")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    tables = {"synthetic": errors(language_model_like(options.size, torch.Generator().manual_seed(0)).float())}
    if options.minilm:
        each = [errors(W.float()) for W in minilm_weights(options.minilm)]
        tables["MiniLM"] = {name: sum(found[name] for found in each) / len(each) for name in each[0]}
    after = losses(options.texts)
    Console(width=110).print(show(tables, after))
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        options.json.write_text(json.dumps({"about": about, "errors": tables, "losses": after}, indent=2) + "\n")


if __name__ == "__main__":
    main()
