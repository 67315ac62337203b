"""What each way to round the base costs before any training, for blocks of 64 and of 32 numbers.

    python benchmarks/quality/rounding.py [--data DIRECTORY --model DIRECTORY] [--minilm DIRECTORY] [--json FILE]

NF4(W); NF4(W V) Vᵀ, the base in the frame of its singular vectors (held in bf16), of a Hadamard basis or of a random
one; and NF4(W - U S Vᵀ) + U S Vᵀ with an eighth of the rank, in bf16. Figures: the shipped model's loss on text; with
``--model`` a language model's loss on 64 of GSM8K's answers; with ``--minilm`` the error of a sentence encoder's word
by word output on SST-2's sentences.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from base import BF16, Base
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from frame import Directions, from_frame, hadamard, to_frame
from language import LanguageTask
from questions import read_examples
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sentences import SentenceTask, read_sentences
from studies import LONGEST
from torch import Tensor, nn
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vocabulary import finetune, logits_and_loss, relative, text_batches

BLOCKS = (64, 32)
SHARE = 8
ANSWERS = 64
Rounding = Callable[[Tensor], Tensor]
Figure = Callable[[Any], float]


def nf4(W: Tensor, block: int) -> Tensor:
    """W rounded to NF4 with the scales of the blocks in 8 bits."""
    packed, state = quantize_4bit(
        W.to(torch.bfloat16).contiguous(), blocksize=block, quant_type="nf4", compress_statistics=True
    )
    return dequantize_4bit(packed, state).to(W.dtype)


def in_frame(W: Tensor, block: int, directions: Directions | None) -> Tensor:
    """NF4 in a frame; that of the singular vectors of W where none is given."""
    if directions is None:
        U, _, Vt = torch.linalg.svd(W, full_matrices=False)
        V = (Vt if W.shape[1] <= W.shape[0] else U.t()).to(torch.bfloat16).to(W.dtype)
        return from_frame(nf4(to_frame(W, lambda size: V), block), lambda size: V)
    return from_frame(nf4(to_frame(W, directions), block), directions)


@cache
def drawn(size: int) -> Tensor:
    """A random orthonormal matrix."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(size)))[0]


def residual(W: Tensor, block: int) -> Tensor:
    """An eighth of the singular triplets in bf16, the rest in NF4."""
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    k = max(1, len(s) // SHARE)
    U, Vt = (one.to(torch.bfloat16).to(W.dtype) for one in (U[:, :k], Vt[:k]))
    kept = (U * s[:k]) @ Vt
    return nf4(W - kept, block) + kept


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "NF4(W)": nf4,
    "in the frame of singular vectors": partial(in_frame, directions=None),
    "in the frame of a Hadamard basis": partial(in_frame, directions=hadamard),
    "in the frame of a random basis": partial(in_frame, directions=drawn),
    f"residual, 1/{SHARE} of the rank": residual,
}


@torch.no_grad()
def round_linears(model: Any, rounding: Rounding) -> Any:
    """Every linear weight but the head's, rounded in place; the model."""
    head = model.get_output_embeddings()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            layer.weight.copy_(rounding(layer.weight.float()))
    return model


def language(model: Path, data: Path) -> tuple[Callable[[], Any], Figure]:
    """How a language model is loaded, and its loss on GSM8K's answers."""
    base = Base(model)
    held_out = read_examples(data / "gsm8k" / "dev.jsonl", base.tokenizer, LONGEST)[:ANSWERS]
    task = LanguageTask("gsm8k", base, [], held_out, torch.empty(0))
    return lambda: base.load(BF16), lambda one: task.mean_loss(one.eval(), held_out)


def shipped() -> tuple[Callable[[], Any], Figure]:
    """The same of the shipped model, on text that it has read."""
    texts = text_batches(100, 0)
    return lambda: Base(finetune.BASE_MODEL).load(BF16), lambda one: logits_and_loss(one.eval(), texts)[1]


def encoder(model: Path, data: Path) -> tuple[Callable[[], Any], Figure]:
    """The same of an encoder: how far its output is from that of its own weights."""
    base = Base(model, classes=2)
    task = SentenceTask("sst2", base, [], read_sentences(data / "sst2" / "dev.tsv", base.tokenizer))
    batches = [{name: one[name] for name in one if name != "labels"} for one in task._batches(task.held_out, 64)]

    def load() -> Any:
        return AutoModel.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="eager").eval()

    def states(one: Any) -> Tensor:
        return torch.cat([one(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches])

    exact = states(load())
    return load, lambda one: relative(states(one), exact)


@torch.no_grad()
def figures(load: Callable[[], Any], figure: Figure, title: str) -> dict[str, float]:
    """A model's figure for each way to hold its base."""
    found = {"bf16": figure(load())}
    ways = [(name, block) for name in WAYS for block in BLOCKS]
    for name, block in track(ways, description=title, console=Console(stderr=True)):
        found[f"{name}, blocks of {block}"] = figure(round_linears(load(), partial(WAYS[name], block=block)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="with gsm8k/dev.jsonl and sst2/dev.tsv")
    parser.add_argument("--model", type=Path, help="a language model's directory")
    parser.add_argument("--minilm", type=Path, help="a sentence encoder's directory")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if (options.model or options.minilm) and not options.data:
        parser.error("--model and --minilm want --data")
    found = {"shipped model, loss": figures(*shipped(), "shipped model")}
    if options.model:
        found["language model, loss"] = figures(*language(options.model, options.data), "language model")
    if options.minilm:
        found["encoder, error"] = figures(*encoder(options.minilm, options.data), "encoder")
    table = Table(title="Before any training")
    table.add_column("base", no_wrap=True)
    for title in found:
        table.add_column(title, justify="right")
    for name in next(iter(found.values())):
        table.add_row(name, *(f"{values[name]:.4f}" for values in found.values()))
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
