"""A training step as it is, under torch.compile, and on a card with CUDA graphs as well, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import Bench
from clock import summary
from models import step
from rivals import RIVALS, scenario
from sizes import Model

STAGE = "compiled"
EAGER = "as it is"
WAYS: dict[str, dict[str, Any]] = {
    EAGER: {},
    "torch.compile": {"mode": "default"},
    "torch.compile, CUDA graphs": {"mode": "reduce-overhead"},
}


def run(bench: Bench, models: Sequence[Model]) -> None:
    """The default method on every model."""
    ours = next(rival for rival in RIVALS if rival.text == "qsvft")
    ways = [way for way in WAYS if bench.device == "cuda" or "CUDA" not in way]

    def measure(model: Model) -> dict[str, Any]:
        steps = {}
        for way in ways:
            built = scenario(ours, model.config, bench.device)
            if WAYS[way]:
                built.model.compile(**WAYS[way])
            steps[way] = step(built, model.tokens)
        found = summary(bench.time(steps), EAGER)
        return {"model": model.name, "tokens": model.tokens, "unit": EAGER, "methods": found, "refused": {}}

    for model in models:
        bench.attempt(STAGE, f"{STAGE} | {model.name} | {model.tokens} tokens", lambda model=model: measure(model))
