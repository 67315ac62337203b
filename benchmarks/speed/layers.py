"""Forward and backward of single adapted linears, all rivals in turns: each of the shapes that a model's layer has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench import Bench, Built
from clock import summary
from described import described, linears
from operators import forward_and_backward
from sizes import one_layer
from torch import nn

STAGE = "layer"


@dataclass(frozen=True)
class Place:
    """One of a layer's linears: the first of its shape.

    Attributes:
        model: whose shapes.
        leaf: the linear's own name.
        m, n: outputs and inputs.
    """

    model: str
    leaf: str
    m: int
    n: int

    def case(self, stage: str, tokens: int, more: str = "") -> str:
        """As rows name it."""
        return f"{stage} | {self.model} | {self.leaf} {self.m} x {self.n} | {tokens} tokens{more}"


def places(model: str) -> list[Place]:
    """The linears of one layer of a model, each shape once, in the layer's order."""
    config: Any = one_layer(model)
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    shapes = {
        "q_proj": (config.num_attention_heads * head, width),
        "k_proj": (config.num_key_value_heads * head, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    first: dict[tuple[int, int], str] = {}
    for leaf, shape in shapes.items():
        first.setdefault(shape, leaf)
    return [Place(model, leaf, *shape) for shape, leaf in first.items()]


def layer_of(model: nn.Module, place: Place) -> Any:
    """The adapted layer at a place."""
    return next(layer for name, layer in linears(model) if name.endswith(f".{place.leaf}"))


def run(bench: Bench, models: Sequence[str], tokens: Sequence[int]) -> None:
    """Every shape of every model at every number of tokens."""
    for model in models:
        wanted = [(place, t) for place in places(model) for t in tokens]
        wanted = [(place, t) for place, t in wanted if not bench.rows.done(place.case(STAGE, t))]
        if not wanted:
            continue
        built, refused = bench.build(one_layer(model))
        for place, t in wanted:
            bench.attempt(STAGE, place.case(STAGE, t), partial(_times, bench, built, refused, place, t))


def _times(bench: Bench, built: Built, refused: dict[str, str], place: Place, tokens: int) -> dict[str, Any]:
    layers = {rival.name: layer_of(found.model, place) for rival, found in built.items()}
    times = bench.time({name: step(layer, tokens, bench.device) for name, layer in layers.items()})
    about = {"model": place.model, "linear": place.leaf, "shape": [place.m, place.n], "tokens": tokens}
    unit = bench.rivals[0].name
    return {**about, "unit": unit, "methods": summary(times, unit), "refused": refused}


def step(layer: Any, tokens: int, device: str) -> Callable[[], None]:
    """Forward and backward of a layer on random activations, the gradient of its input included."""
    linear = described(layer)
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(1, tokens, size, generator=generator) for size in (linear.n, linear.m))
    return forward_and_backward(
        layer, x.to(device, torch.bfloat16).requires_grad_(), gradient.to(device, torch.bfloat16)
    )
