"""What a run will take, said before it starts: bytes by what they are for, steps, trained numbers, time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig

from ..memory.cards import GIB, needed_bytes, unit_of
from ..memory.fit.options import card_size
from ..memory.fit.recommend import recommend
from ..memory.methods import COUNTED, Method
from ..memory.profiler import profile, resolve
from ..memory.rows import Row
from ..memory.shapes import model_without_values
from ..options.adapter import OPTIONS
from ..storage.shapes_only import shapes_only
from ..tuner.config import QSVFTConfig
from ..tuner.progress import progress_bars
from ..tuner.targets import check_targets
from .base import Base

_OPERATIONS = {True: 8, False: 6}
"""A weight and token: two each for forward, recomputation if there is one and the inputs' gradient, and as much again
for what is no product with a weight."""


@dataclass(frozen=True)
class Step:
    """The largest step of a run, counted.

    Attributes:
        model, config: its name, and the model's config.
        options: of the adapter and the step, those that were chosen for a card among them.
        chosen: these alone.
        batch_size, seq_len: sequences at once, and their tokens.
        row: predicted bytes at the peak, by what they are for.
        card_bytes: of the card that it has to fit; None on a CPU.
    """

    model: str
    config: PretrainedConfig
    options: dict[str, Any]
    chosen: dict[str, Any]
    batch_size: int
    seq_len: int
    row: Row
    card_bytes: int | None

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward."""
        return self.options.get("gradient_checkpointing") is not False


@dataclass(frozen=True)
class Forecast:
    """Sizes of a run. ``print`` shows them.

    Attributes:
        step: the largest step.
        weights: numbers in the linear layers.
        lengths: tokens of rows that were looked at.
        rows, held_out, steps: how many there are.
        config: the trainer's arguments.
        seconds: of all steps, from a product that was timed here.
        preferences: whether the loss is on pairs of answers, whose logits are not counted.
    """

    step: Step
    weights: int
    lengths: Sequence[int]
    rows: int
    held_out: int
    steps: int
    config: Any
    seconds: float
    preferences: bool = False

    def __str__(self) -> str:
        lines = [
            ("model", f"{self.step.model}, {_count(self.weights)} weights in linear layers"),
            ("trained", self._trained()),
            ("data", self._data()),
            ("steps", self._steps()),
            ("memory", self._memory()),
            *(("", text) for text in self._categories()),
            ("time", f"roughly {in_words(self.seconds)} of training, from a product timed here"),
        ]
        return "\n".join(f"{name + ':' if name else '':<9}{text}" for name, text in lines)

    def _trained(self) -> str:
        trained = self.step.row.trainable_parameters
        return f"{trained:,} numbers, {trained / max(1, self.weights):.2%} as many" if trained else "not counted"

    def _data(self) -> str:
        held = f" and {self.held_out:,} held out" if self.held_out else ""
        middle, most = statistics.median(self.lengths), max(self.lengths)
        looked = f"of {len(self.lengths)} looked at"
        return f"{self.rows:,} rows{held}; {middle:.0f} tokens in the middle, {most} at most {looked}"

    def _steps(self) -> str:
        c = self.config
        cards = f" on each of {c.world_size}" if c.world_size > 1 else ""
        return (
            f"{self.steps} of {c.per_device_train_batch_size} x {c.gradient_accumulation_steps} rows{cards}, learning "
            f"rate {c.learning_rate:g}"
        )

    def _memory(self) -> str:
        step, (unit, size) = self.step, unit_of([self.step.row.peak_bytes])
        if step.row.error is not None:
            return f"not predicted ({step.row.error})"
        card = f"; it has {step.card_bytes / GIB:.2f}" if step.card_bytes is not None else ""
        apart = ", without the logits of both answers" if self.preferences else ""
        return (
            f"a peak of {step.row.peak_bytes / size:.2f} {unit} predicted at {step.batch_size} x {step.seq_len} "
            f"tokens{apart}, {needed_bytes(step.row.peak_bytes) / GIB:.2f} GiB of a card{card}"
        )

    def _categories(self) -> list[str]:
        row = self.step.row
        _, size = unit_of([row.peak_bytes])
        found = sorted(row.categories.items(), key=lambda item: -item[1])
        return [f"{nbytes / size:8.2f}  {name}" for name, nbytes in found if nbytes >= 0.005 * row.peak_bytes]


def in_words(seconds: float) -> str:
    """A time as a person says it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,}"


def forecast(
    base: Base, given: Mapping[str, Any], config: Any, seq_len: int, answers: int, fit: str | float | None
) -> Step:
    """Count the largest step of a run, and choose its options for a card where one is given.

    Args:
        base: which, and how it is held.
        given: fields of a config and switches.
        config: the trainer's arguments.
        seq_len: tokens of the longest sequence.
        answers: sequences a row: 2 of preferences.
        fit: a card's size.

    Raises:
        ValueError: it does not fit the card, or this machine, with what would.
    """
    (name, of_model), chosen = resolve(base.name), dict[str, Any]()
    options, card, batch_size = dict(given), present_card(), config.per_device_train_batch_size * answers
    if fit is not None:
        card = int(card_size(fit) * GIB)
        fixed = {key: value for key, value in options.items() if value is not None}
        found = recommend(of_model, card / GIB, seq_len, batch_size, progress=True, **fixed)
        if not found.fits:
            raise ValueError(str(found))
        chosen = dict(found.options)
        options = {**chosen, **options}
    fields = {key: value for key, value in options.items() if key in OPTIONS}
    with shapes_only():
        check_targets(model_without_values(of_model), QSVFTConfig(task_type="CAUSAL_LM", **fields))
    counted = {key: value for key, value in options.items() if key in COUNTED and value is not None}
    checkpointing = bool(counted.pop("gradient_checkpointing", True))
    method = Method("qsvft", "qsvft", {**counted, **({"bits": base.bits} if base.bits != 4 else {})})
    if base.bits == 8 or base.dtype == "float32":
        row = Row("qsvft", error=f"a base {'of 8 bits' if base.bits == 8 else 'in float32'} is not counted")
    else:
        with progress_bars(False):
            row = profile(of_model, [method], batch_size, seq_len, checkpointing).rows[0]
    step = Step(name, of_model, options, chosen, batch_size, seq_len, row, card)
    if row.error is None:
        _check_room(step)
    return step


def _check_room(step: Step) -> None:
    what = f"a step of {step.batch_size} x {step.seq_len} tokens is predicted to"
    smaller = "a smaller --max-length or --per-device-train-batch-size"
    if step.card_bytes is not None and needed_bytes(step.row.peak_bytes) > step.card_bytes:
        size = f"{step.card_bytes / GIB:.1f}"
        raise ValueError(
            f"{what} need {needed_bytes(step.row.peak_bytes) / GIB:.2f} GiB of a card, and this one has {size}; "
            f"expected one that fits. Let the settings be chosen (--fit {size}GiB), or give {smaller}."
        )
    room = psutil.virtual_memory().total
    if step.card_bytes is None and step.row.peak_bytes > room:
        raise ValueError(
            f"{what} peak at {step.row.peak_bytes / GIB:.2f} GiB, and this machine has {room / GIB:.2f}; expected "
            f"less. Give {smaller}, or a smaller model."
        )


def present_card() -> int | None:
    """The bytes of the card that training will run on; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def linear_weights(config: PretrainedConfig) -> int:
    """Numbers in the linear layers of a model, its head among them."""
    layers = model_without_values(config).modules()
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


def seconds_of(weights: int, tokens: int, checkpointing: bool) -> float:
    """Of a step of so many tokens: its operations over what a product reaches here in bf16."""
    return _OPERATIONS[checkpointing] * weights * tokens / _operations_a_second()


def _operations_a_second(size: int = 1024, least: float = 0.05) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    _ = (a @ a).sum().item()  # the first is slower
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < least:
        _ = (a @ a).sum().item()  # waits for the card
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - began)


def steps_of_run(rows: int, tokens: int, config: Any, packed: int | None) -> int:
    """Steps of the optimizer; ``packed`` is the length that rows are packed into."""
    if config.max_steps > 0:
        return int(config.max_steps)
    sequences = math.ceil(tokens / packed) if packed else rows
    a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return max(1, math.ceil(math.ceil(sequences / a_step) * config.num_train_epochs))
