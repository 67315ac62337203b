"""Whole training steps of small models, all rivals in turns: forward, backward with checkpointing, fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench import Bench
from clock import summary
from sizes import Model
from steps import Stepper
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qsvft.memory.attention import ATTENTION
from qsvft.memory.scenario import Scenario

STAGE = "step"
CHECKPOINT_TOKENS = 512


def run(bench: Bench, models: Sequence[Model], checkpoint: Path | None = None) -> None:
    """A step of every model, and of a checkpoint on disk."""
    for model in models:
        _run(bench, model, None)
    if checkpoint is not None:
        config = AutoConfig.from_pretrained(checkpoint)
        model = Model(checkpoint.resolve().name, CHECKPOINT_TOKENS, config)
        _run(bench, model, lambda: load(checkpoint, bench.device))


def _run(bench: Bench, model: Model, make: Callable[[], PreTrainedModel] | None) -> None:
    def measure() -> dict[str, Any]:
        built, refused = bench.build(model.config, make)
        steps = {rival.name: step(found, model.tokens) for rival, found in built.items()}
        found = summary(bench.time(steps), bench.rivals[0].name)
        for row in found.values():
            row["tokens_per_s"] = 1000 * model.tokens / row["median_ms"]
        weights = "random" if make is None else "the checkpoint's"
        about = {"model": model.name, "tokens": model.tokens, "weights": weights}
        return {**about, "unit": bench.rivals[0].name, "methods": found, "refused": refused}

    bench.attempt(STAGE, f"{STAGE} | {model.name} | {model.tokens} tokens", measure)


def step(scenario: Scenario, tokens: int) -> Callable[[], None]:
    """A training step on random tokens, under bf16 autocast and with the optimizer of transformers' Trainer."""
    stepper = Stepper(scenario, fused=True, autocast=True)
    torch.manual_seed(0)
    batch = stepper.tokens(tokens)
    return lambda: stepper.step(batch)


def load(folder: Path, device: str) -> PreTrainedModel:
    """A frozen model of a directory in bf16, with the attention that random ones have."""
    named = {"attn_implementation": ATTENTION} if device == "cpu" else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **named)
    return model.to(device).requires_grad_(False)
