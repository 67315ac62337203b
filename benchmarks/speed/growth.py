"""How time and bytes grow: exponents fitted to doublings of one size at a time, beside those that the mathematics has.

    y ~ c x^e        e by least squares of log y over log x

Time is a whole step's, and its exponent is held against that of the flops that are asked for, fitted to the same sizes:
beside its leading term a step has others, and both fits see them. Bytes are the ledger's, the most that a category ever
has; there the exponent is the leading term's, and other terms pull what is found towards 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from typing import Any

from bench import Bench
from clock import spread
from floor import step_parts
from models import step
from rivals import Rival, scenario
from transformers import LlamaConfig

from qsvft.memory.methods import parse_method
from qsvft.memory.scenario import Scenario

STAGE = "growth"
LEAST_BYTES = 2**14
"""A category below this is the allocator's rounding."""


@dataclass(frozen=True)
class Point:
    """The sizes of a model and of its step."""

    tokens: int = 512
    rank: int = 64
    width: int = 512
    layers: int = 2
    vocabulary: int = 4096

    def config(self) -> LlamaConfig:
        """A Llama of these sizes, with heads of 64 and an inner width of twice the width."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            tie_word_embeddings=False,
        )

    def rival(self, rival: Rival) -> Rival:
        """A rival at this rank, where its rank is free: a dense M's and LoRA's."""
        return replace(rival, text=_with_rank(rival.text, self.rank)) if free_rank(rival) else rival


SMALL = Point(tokens=256, rank=16, width=128, layers=1, vocabulary=512)
AXES = ("tokens", "rank", "width", "layers", "vocabulary")
FACTORS = (1, 2, 4)

HELD = ("base weights", "other weights", "factors", "trainable", "gradients", "optimizer")
PASSING = {"tokens": ("saved activations",), "width": ("saved activations",), "layers": ("saved activations",)}
"""What lasts as long as the model, and what comes and goes, by the axes along which it has a law of its own."""

ASKED: Mapping[str, Mapping[str, int]] = {
    "tokens": {"saved activations": 1, "logits and loss": 1},
    "rank": {"factors": 1, "trainable": 2, "gradients": 2, "optimizer": 2},
    "width": {"base weights": 2, "factors": 1, "saved activations": 1, "other weights": 1},
    "layers": {"base weights": 1, "factors": 1, "trainable": 1, "gradients": 1, "optimizer": 1, "saved activations": 1},
    "vocabulary": {"other weights": 1, "logits and loss": 1},
}
"""Exponents of the leading terms, of a dense M between a fixed number of directions; 0 where none is written."""


def free_rank(rival: Rival) -> bool:
    """Whether the rank of a rival may be any: of LoRA, and of a dense M."""
    name, _, options = rival.text.partition(":")
    return name.startswith("qlora") or (name == "qsvft" and "pattern=" not in options)


def _with_rank(text: str, rank: int) -> str:
    name, _, options = text.partition(":")
    kept = [part for part in options.split(",") if part and not part.startswith("rank=")]
    return f"{name}:{','.join([f'rank={rank}', *kept])}"


def asked(rival: Rival, axis: str, category: str) -> float:
    """The exponent of a category's bytes along an axis.

    What LoRA trains grows as the factors of others do. At full rank k is the width: factors grow as W, a diagonal or a
    band as the width.
    """
    trained = category in ("trainable", "gradients", "optimizer")
    if rival.text.startswith("qlora") and trained:
        return float(ASKED[axis].get("factors", 0))
    if axis == "width" and not free_rank(rival) and (trained or category == "factors"):
        return 1.0 if trained else 2.0
    return float(ASKED[axis].get(category, 0))


def passing(rival: Rival, axis: str) -> tuple[str, ...]:
    """What comes and goes and has a law along an axis: not where the authors' W' is kept beside the activations."""
    return () if rival.text == "svft-authors" else PASSING.get(axis, ())


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x by least squares.

    Raises:
        ValueError: fewer than two points, or a number that is not positive.
    """
    if len(xs) < 2 or len(xs) != len(ys) or min(*xs, *ys) <= 0:
        raise ValueError(f"found the points {list(xs)}, {list(ys)}; expected at least two, all positive")
    us, vs = [log(x) for x in xs], [log(y) for y in ys]
    u, v = sum(us) / len(us), sum(vs) / len(vs)
    return sum((a - u) * (b - v) for a, b in zip(us, vs, strict=True)) / sum((a - u) ** 2 for a in us)


def run(bench: Bench, start: Point = Point(), axes: Sequence[str] = AXES) -> None:
    """Every rival along every axis that it has."""
    for rival in bench.rivals:
        for axis in axes:
            if axis != "rank" or free_rank(rival):
                case = f"{STAGE} | {rival.name} | {axis}"
                bench.attempt(STAGE, case, partial(_along, bench, rival, start, axis))


def _along(bench: Bench, rival: Rival, start: Point, axis: str) -> dict[str, Any]:
    points = [replace(start, **{axis: factor * getattr(start, axis)}) for factor in FACTORS]
    sizes: list[float] = [getattr(point, axis) for point in points]
    live = [bytes_of(rival, point) for point in points]
    loss = ("logits and loss",) if axis == "vocabulary" or (axis == "tokens" and not chunked(rival)) else ()
    rows = [
        _row("bytes", category, sizes, [one[category] for one in live], asked(rival, axis, category))
        for category in (*HELD, *passing(rival, axis), *loss)
        if min(one.get(category, 0) for one in live) >= LEAST_BYTES
    ]
    built = [built_at(rival, point, bench.device) for point in points]
    steps: dict[str, Callable[[], None]] = {
        str(size): step(one, point.tokens) for size, one, point in zip(sizes, built, points, strict=True)
    }
    times = [spread(values)[0] for values in bench.time(steps).values()]
    work = [flops_of(one, point) for one, point in zip(built, points, strict=True)]
    rows.insert(0, _row("ms", "step", sizes, times, exponent(sizes, work)))
    return {"method": rival.name, "axis": axis, "sizes": sizes, "rows": rows}


def _row(unit: str, of: str, sizes: list[float], values: list[float], asked_for: float) -> dict[str, Any]:
    return {"of": of, "unit": unit, "values": values, "exponent": exponent(sizes, values), "asked": asked_for}


def built_at(rival: Rival, point: Point, device: str) -> Scenario:
    """A rival on a model of these sizes."""
    return scenario(point.rival(rival), point.config(), device)


def bytes_of(rival: Rival, point: Point) -> dict[str, int]:
    """The most bytes of a step that each category had at a time, on tensors without values."""
    ledger, _ = built_at(rival, point, "meta").count(1, point.tokens)
    live: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for event in ledger.events:
        category = event.allocation.category
        live[category] += event.nbytes
        most[category] = max(most[category], live[category])
    return dict(most)


def flops_of(built: Scenario, point: Point) -> float:
    """What a step asks for, a layer's second forward included."""
    return float(sum(part.flops for part in step_parts(built, point.tokens)))


def chunked(rival: Rival) -> bool:
    """Whether a rival's loss goes through the logits in chunks, whose bytes do not grow with the tokens."""
    return parse_method(rival.text).chunked_loss
