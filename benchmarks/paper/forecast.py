"""What a run will take, said before it starts: memory, time, disk; and the nearest smaller setting that fits."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig

from qsvft.lean.norms import lean_norms
from qsvft.memory.cards import GIB, needed_bytes
from qsvft.memory.methods import Method as Counted
from qsvft.memory.methods import build
from qsvft.memory.step import count_on
from qsvft.storage.shapes_only import shapes_only
from qsvft.training.forecast import in_words, present_card, seconds_of, steps_of_run
from qsvft.tuner.calibration import with_basis

from .experiment import FULL, OURS, WHOLE, Experiment, Method
from .run import OneRun, arguments_of
from .shapes import shape_of
from .ways import config_of, trains_whole

_LOOKED_AT = 500
_OPTIMIZER_BYTES = 8
"""AdamW's two moments of a number in fp32."""


@dataclass(frozen=True)
class Forecast:
    """Of one run. ``str`` is a line for a person.

    Attributes:
        peak_bytes, held_bytes: of a step, predicted, and of what is loaded.
        room_bytes: of the card, or of this machine where there is none.
        card: whether it is a card.
        steps, seconds: of training; ``asking_seconds`` of all answers as long as they may be.
        disk_bytes, free_bytes: that are written, at most, and that there are.
        why_not: the reason where memory cannot be counted.
    """

    peak_bytes: int
    room_bytes: int
    card: bool
    steps: int
    seconds: float
    asking_seconds: float
    disk_bytes: int
    free_bytes: int
    why_not: str | None = None

    @property
    def needed(self) -> int:
        """Of a card with what its driver takes."""
        return needed_bytes(self.peak_bytes) if self.card else self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether there is room for a step."""
        return self.why_not is not None or self.needed <= self.room_bytes

    def __str__(self) -> str:
        where = "the card has" if self.card else "this machine has"
        memory = (
            f"memory not predicted ({self.why_not})"
            if self.why_not
            else f"{self.needed / GIB:.2f} GiB predicted, {where} {self.room_bytes / GIB:.1f}"
        )
        disk = f"up to {self.disk_bytes / GIB:.2f} GiB of disk, {self.free_bytes / GIB:.1f} free"
        times = (
            f"{self.steps} steps in roughly {in_words(self.seconds)}, asking at most {in_words(self.asking_seconds)}"
        )
        return f"{memory}; {times}; {disk}"


def forecast(run: OneRun, checkpointing: bool | None = None) -> Forecast:
    """Count a run that has not begun.

    Raises:
        ValueError: the data or the model is not there.
    """
    experiment, method, kind = run.experiment, run.method, run.kind
    arguments, config = run.arguments, shape_of(experiment)
    lengths = kind.lengths(_LOOKED_AT)
    rows = len(kind.rows)
    size, longest = arguments.per_device_train_batch_size, max(lengths)
    peak, held, trained, weights, why_not = _counted(run, config, size, longest, arguments)
    card = present_card()
    mean = sum(lengths) / len(lengths)
    steps = steps_of_run(rows, int(mean * rows), arguments, None)
    a_step = int(mean * size * arguments.gradient_accumulation_steps)
    checkpoints = trained * (4 + _OPTIMIZER_BYTES) * ((arguments.save_total_limit or 1) + 1) + 4 * trained
    prepared = held if method.way == OURS and experiment.kind == "language" else 0
    download = 0 if os.path.isdir(experiment.model) else 2 * weights
    return Forecast(
        peak,
        card if card is not None else psutil.virtual_memory().total,
        card is not None,
        steps,
        steps * seconds_of(weights, a_step, bool(arguments.gradient_checkpointing)),
        _asking_seconds(run, weights, mean),
        checkpoints + prepared + download,
        shutil.disk_usage(_existing(run.folder)).free,
        why_not,
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _asking_seconds(run: OneRun, weights: int, mean: float) -> float:
    """Of reading all questions, and of writing answers as long as they may be: by flops, or by reading the weights."""
    total, rate = 0.0, _bytes_a_second()
    for name, asked in run.experiment.asked.items():
        questions = len(run.kind.asked[name])
        new = asked.max_new_tokens if run.experiment.kind == "language" else 0
        products = seconds_of(weights, int(questions * (mean + new)), False) / 3  # forward alone, of three
        total += max(products, questions / run.kind.batch_size * new * 2 * weights / rate)
    return total


def _bytes_a_second(size: int = 2**26) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    b.copy_(a)
    began, times = time.perf_counter(), 4
    for _ in range(times):
        b.copy_(a)
    float(b[0])  # waits for the card
    return times * size / (time.perf_counter() - began)


def _counted(
    run: OneRun, config: PretrainedConfig, size: int, longest: int, arguments: Any
) -> tuple[int, int, int, int, str | None]:
    """The peak, what is held, how many numbers train, how many weights products have, and why there is no peak."""
    method, kind = run.method, run.kind
    base = kind.without_values(config)
    weights = sum(layer.weight.numel() for layer in base.modules() if isinstance(layer, nn.Linear))
    model, whole = without_values(method, base, kind.task_type), sum(p.numel() for p in base.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method.bits == 8:
        return 0, whole, trained, weights, "a base of 8 bits is not counted"
    batch = None if run.experiment.kind == "language" else kind.example(config, size, longest)
    head = base.get_output_embeddings() if batch is None else None
    try:
        ledger, _ = count_on(
            model, base, head, size, longest, bool(arguments.gradient_checkpointing), "adamw", True, batch
        )
    except Exception as error:  # of a model's own code, which may look at values
        return 0, whole, trained, weights, f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    peak = ledger.peaks()["total"]
    held = sum(peak.categories.get(name, 0) for name in ("base weights", "other weights", "factors"))
    doubled = 2 if method.dtype == "float32" and method.way == FULL else 1  # it is counted in bf16
    return peak.nbytes * doubled, held, trained, weights, None


def without_values(method: Method, base: Any, task_type: str | None) -> nn.Module:
    """The model that a method trains, without values, of a base without values; the base is changed in place."""
    if method.way in WHOLE:
        return trains_whole(base, method)
    if method.way == OURS and method.calibration:
        method = replace(method, options=with_basis(dict(method.options), method.calibration, method.bits == 4))
    counted = Counted.of(method.name, config_of(method, task_type), method.bits)
    if method.way == OURS and task_type == "CAUSAL_LM":
        counted = Counted(method.name, "qsvft", {**method.options, "bits": method.bits})
    elif method.way == OURS:
        base = lean_norms(base)  # as qsvft.prepare has it
    with shapes_only():
        return build(counted, base)


def smaller(experiment: Experiment, method: Method) -> Iterator[tuple[str, Experiment, Method]]:
    """Settings that need less, the nearest first, with what to say for each: the same step in smaller parts, 4 bits."""
    given = arguments_of(experiment, method, 0)
    size, parts = given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1)
    said: dict[str, Any] = {}

    def told() -> str:
        return " ".join(["--set", *(f"{name}={str(value).lower()}" for name, value in said.items())]) if said else ""

    def changed(bits: int) -> tuple[Experiment, Method]:
        training = {**experiment.training, **said}
        own = {name: value for name, value in method.training.items() if name not in said}
        return replace(experiment, training=training), replace(method, bits=bits, training=own)

    if not given.get("gradient_checkpointing"):
        said["gradient_checkpointing"] = True
        yield told(), *changed(method.bits)
    while size > 1 and size % 2 == 0:
        size, parts = size // 2, parts * 2
        said |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        yield told(), *changed(method.bits)
    if method.way not in WHOLE and method.bits > 4:
        yield f"{told()} --bits 4", *changed(4)


def check(run: OneRun, found: Forecast, another: Any) -> None:
    """Refuse what does not fit, and say what does.

    Args:
        another: gives the run of another experiment and method.

    Raises:
        ValueError: no room for a step, or on the disk.
    """
    where = f"{run.experiment.name}, {run.method.name}: "
    if found.disk_bytes > found.free_bytes:
        raise ValueError(
            f"{where}found {found.free_bytes / GIB:.2f} GiB free on the disk of {run.folder}; expected "
            f"{found.disk_bytes / GIB:.2f}. Give another --output, or make room."
        )
    if found.fits:
        return
    for words, experiment, method in smaller(run.experiment, run.method):
        less = forecast(another(experiment, method))
        if less.fits:
            hint = f"{words.strip()} fits, with {less.needed / GIB:.2f} GiB."
            break
    else:
        hint = "No smaller setting of it fits; leave the method out by --methods."
    raise ValueError(
        f"{where}a step is predicted to need {found.needed / GIB:.2f} GiB; found {found.room_bytes / GIB:.2f}. {hint}"
    )
