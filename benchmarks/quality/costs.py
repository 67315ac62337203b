"""What a step of each method costs: bytes by the ledger, time by the clock.

    python benchmarks/quality/costs.py --study NAME --out FILE [--rounds 8] [--shapes llama-3-8b]

Bytes: the predicted peak of a step on Llama-3-8B with an NF4 base, one sequence of 2048 tokens, checkpointing. Time: of
a step of a small Llama with checkpointing, in units of the first method's: 4 layers 1024 wide on 1024 tokens, or 2
layers of Llama-3-8B's shapes on 512. The methods take turns, and the median of their ratios within a round counts. Let
nothing else run meanwhile. What the file has of other methods and shapes stays.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from base import DENSE
from methods import METHODS, Method, Setting
from rich.console import Console
from rich.progress import track
from studies import jobs
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import qsvft
from qsvft.lean.checkpointing import enable_checkpointing

sys.path.append(str(Path(__file__).resolve().parents[1] / "speed"))
from clock import interleaved, ratios

UNIT = "LoRA r=16"
VOCABULARY = 8192
MODEL, LENGTH = "llama-3-8b", 2048


@dataclass(frozen=True)
class Shapes:
    """A model to time.

    Attributes:
        figure: what the file calls the time of its step.
        tokens: in a step.
        sizes: of the model.
    """

    figure: str
    tokens: int
    sizes: dict[str, int]


NARROW = Shapes(
    "step",
    1024,
    {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16},
)
SHAPES = {
    "1024-wide": NARROW,
    MODEL: Shapes(
        "step_8b",
        512,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
}


@dataclass(frozen=True)
class Noise:
    """A task of random tokens, for methods that look at one before they begin.

    Attributes:
        shapes: of the model.
    """

    shapes: Shapes

    name, kind = "noise", "CAUSAL_LM"

    def load(self, held: str, seed: int) -> nn.Module:
        """The model, which is as it is however it is to be held: a step takes no longer or shorter for its numbers."""
        config = LlamaConfig(vocab_size=VOCABULARY, dtype=torch.bfloat16, **self.shapes.sizes)
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)

    def own_batches(self) -> list[dict[str, torch.Tensor]]:
        """The same tokens."""
        return [self.batch()]

    def batch(self) -> dict[str, torch.Tensor]:
        """Tokens that are their own labels."""
        ids = torch.randint(VOCABULARY, (1, self.shapes.tokens), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's own loss."""
        loss: torch.Tensor = model(**batch, use_cache=False).loss
        return loss


def stepper(method: Method, shapes: Shapes) -> Any:
    """A function that does one step of a method."""
    task = Noise(shapes)
    tokens = task.batch()
    model = task.load(DENSE, 0)
    setting: Any = Setting(task, 0, DENSE, [tokens])
    adapted = method.make(model, setting)
    enable_checkpointing(model)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    adapted.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(adapted, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def times(methods: Sequence[Method], rounds: int, shapes: Shapes = NARROW) -> dict[str, float]:
    """The time of a step in units of the first method's."""
    steps = {method.name: stepper(method, shapes) for method in methods}
    progress = partial(track, description="timing", console=Console(stderr=True))
    found = ratios(interleaved(steps, rounds, progress=progress), methods[0].name)
    return {name: median(values) for name, values in found.items()}


def peaks(methods: Sequence[Method]) -> dict[str, float]:
    """The predicted peak in GiB, of those that the profiler knows."""
    counted = {method.name: method.counted for method in methods if method.counted}
    report = qsvft.profile(MODEL, list(dict.fromkeys(counted.values())), seq_len=LENGTH, progress=True)
    found = {row.method: row.peak_bytes / 2**30 for row in report.rows if not row.error}
    return {name: found[text] for name, text in counted.items() if text in found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shapes", choices=SHAPES, default="1024-wide")
    options = parser.parse_args(arguments)
    named = dict.fromkeys(job.method.name for job in jobs(options.study))
    methods = [METHODS[name] for name in dict.fromkeys((UNIT, *named))]
    shapes = SHAPES[options.shapes]
    taken, bytes_needed = times(methods, options.rounds, shapes), peaks(methods)
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in taken:
        found.setdefault(name, {})[shapes.figure] = round(taken[name], 3)
    for name, peak in bytes_needed.items():
        found[name]["peak_gib"] = round(peak, 3)
    staging = options.out.with_name(f".{options.out.name}.part")
    staging.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(staging, options.out)
    Console().print_json(data=found)


if __name__ == "__main__":
    main()
