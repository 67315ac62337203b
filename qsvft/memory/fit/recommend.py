"""``print(qsvft.recommend("llama-3-8b", card_gib=8))``: the settings that fit a card, why, and what would."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...lean.chunked_loss import chunked_loss_obstacle
from ...tuner.progress import progress_bars
from ..cards import CONTEXT_BYTES, FRAGMENTATION, GIB, check_cards, fits, needed_bytes, unit_of
from ..profiler import check_config, check_settings, longest_fitting, resolve
from ..scenario import Scenario, one_line
from ..shapes import model_without_values
from .ladder import Rung, ladder

CARD_STEP = 10
"""A card that would do is named in tenths of a GiB."""

SOLD_GIB = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80)
"""Cards that one can have instead: what a larger card is as a change, beside a shorter sequence."""

CALIBRATION = "calibration=batches learns more: 0.07 nats of loss (SmolLM2-135M)"

T = TypeVar("T")


@dataclass(frozen=True)
class Recommendation:
    """Settings for a card. ``print`` says which, why, and the line of code to run.

    Attributes:
        model: what was counted.
        card_gib: the card, in GiB.
        seq_len, batch_size, optimizer: tokens a sequence, sequences a step, the optimizer's name.
        options: keywords of :func:`qsvft.prepare`; those left out are at its defaults.
        method: the same for the profiler, which takes gradient checkpointing apart from it. Layers chosen by
            name (target_modules, rank_pattern) are counted, but a method's text cannot say them.
        peak_bytes: the peak of one training step.
        fits: whether the peak fits the card with the allowance. If not, ``options`` are the leanest.
        fixed: the names of the options that were given.
        reasons: a line for each thing that was given up, and what the next better settings would need.
        changes: where nothing fits, arguments of :func:`recommend` with which the leanest settings do, each
            by itself, the smallest change first: a smaller ``batch_size`` if one is enough, else the longest
            ``seq_len`` (a multiple of 128) and the smallest ``card_gib`` (in tenths).
    """

    model: str
    card_gib: float
    seq_len: int
    batch_size: int
    optimizer: str
    options: Mapping[str, Any]
    method: str
    peak_bytes: int
    fits: bool
    fixed: tuple[str, ...]
    reasons: tuple[str, ...]
    changes: tuple[Mapping[str, float], ...] = ()

    @property
    def needed_bytes(self) -> int:
        """What a card has to have: the peak, fragmentation and the CUDA context."""
        return needed_bytes(self.peak_bytes)

    @property
    def nearest_change(self) -> Mapping[str, float] | None:
        """The first of ``changes``, None where the settings fit."""
        return self.changes[0] if self.changes else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``."""
        record = {**asdict(self), "needed_bytes": self.needed_bytes, "nearest_change": self.nearest_change}
        record |= {name: list(record[name]) for name in ("fixed", "reasons", "changes")}
        record["options"] = {key: sorted(v) if isinstance(v, set) else v for key, v in self.options.items()}
        return record

    def __str__(self) -> str:
        step = f"batch {self.batch_size} x {self.seq_len} tokens, {self.optimizer}"
        lines = [f"{self.model} on a card of {self.card_gib:g} GiB, {step}: {'fits' if self.fits else 'nothing fits'}"]
        lines += [f"  {reason}" for reason in self.reasons]
        return "\n".join([*lines, "", self.code()])

    def code(self) -> str:
        """The line to run: with the settings that fit, or asking for what would, on the same card if possible."""
        if not self.changes:
            return _call({"bits": 4, **self.options})
        change = next((change for change in self.changes if "card_gib" not in change), self.changes[0])
        fit = {name: getattr(self, name) for name in ("card_gib", "seq_len", "batch_size", "optimizer")}
        given = {name: self.options[name] for name in self.fixed}
        return _call({"bits": 4, "fit": {**fit, **change}, **given})


def _call(arguments: Mapping[str, Any]) -> str:
    return f"model = qsvft.prepare(model, {', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def recommend(
    model_or_config: object,
    card_gib: float = 8,
    seq_len: int = 2048,
    batch_size: int = 1,
    *,
    optimizer: str = "adamw",
    progress: bool = False,
    **fixed: Any,
) -> Recommendation:
    """Find the best settings for a 4-bit base whose training step fits a card.

    The settings are ordered from the most faithful and fastest to the leanest, see
    :mod:`qsvft.memory.fit.ladder`. The first that fit are found by bisection, each tried by counting one
    training step on tensors without values: half a minute for an 8B model on one core.

    Args:
        model_or_config: a ``PretrainedConfig``, a transformers model, a preset's name, a local directory or
            a hub id. No weights are read.
        card_gib: the card's memory in GiB.
        seq_len: tokens a sequence.
        batch_size: sequences a step.
        optimizer: "adamw", "adamw8bit" or "sgd".
        progress: show on stderr what is counted, if that is a terminal.
        **fixed: options of :func:`qsvft.prepare` that are not to be changed, such as rank=None,
            factor_bits=8, pattern="plain", target_modules=["q_proj"], gradient_checkpointing=True.

    Returns:
        A :class:`Recommendation`; its ``fits`` is False where nothing fits.

    Raises:
        ValueError: one line: an unknown model or option, a size out of its range, a model that is no causal
            language model.
    """
    check_settings(batch_size, seq_len, optimizer, "meta")
    [card] = check_cards([card_gib])
    name, config = resolve(model_or_config)
    check_config(name, config)
    empty = model_without_values(config)
    _check_kind(model_or_config, empty)
    try:
        rungs = ladder(empty, fixed, seq_len * batch_size)
    except ValueError as error:
        raise ValueError(f"model {name!r}: {one_line(error, name=False)}") from error
    if chunked_loss_obstacle(empty) is not None:  # prepare() leaves such a model its own loss
        rungs = [replace(rung, settings={**rung.settings, "chunked_loss": False}) for rung in rungs]
    with _shown(progress) as show:
        counter = _Counter(name, config, optimizer, show)
        place = first_fitting(rungs, lambda rung: counter.peak(rung, batch_size, seq_len), card)
        rung = rungs[min(place, len(rungs) - 1)]
        changes = () if place < len(rungs) else _changes(counter, rung, card, seq_len, batch_size)
        peak = counter.peak(rung, batch_size, seq_len)
        better = None if place in (0, len(rungs)) else rungs[place - 1]
        next_peak = None if better is None else counter.peak(better, batch_size, seq_len)
        calibrated = None if changes else rung.calibrated
        calibrated_peak = None if calibrated is None else counter.peak(calibrated, batch_size, seq_len)
    return Recommendation(
        model=name,
        card_gib=card,
        seq_len=seq_len,
        batch_size=batch_size,
        optimizer=optimizer,
        options=rung.options,
        method=rung.method.label,
        peak_bytes=peak,
        fits=not changes,
        fixed=rung.fixed,
        reasons=tuple(_reasons(rung, peak, card, calibrated_peak, better, next_peak, changes)),
        changes=changes,
    )


def first_fitting(rungs: Sequence[T], peak_of: Callable[[T], int], card_gib: float) -> int:
    """The index of the first rung whose peak fits a card, ``len(rungs)`` if none does.

    By bisection: asks for the peak of about log2 of the rungs, among them that of the rung before the
    result. Peaks must not grow along the rungs.
    """
    return bisect_left(rungs, True, key=lambda rung: fits(peak_of(rung), card_gib))


def _changes(
    counter: _Counter, leanest: Rung, card_gib: float, seq_len: int, batch_size: int
) -> tuple[dict[str, float], ...]:
    """What to change where nothing fits. A smaller batch comes first: accumulated, it is the same step."""
    smaller = range(batch_size - 1, 0, -1)
    place = first_fitting(smaller, lambda size: counter.peak(leanest, size, seq_len), card_gib)
    if place < len(smaller):
        return ({"batch_size": smaller[place]},)
    card = math.ceil(needed_bytes(counter.peak(leanest, batch_size, seq_len)) * CARD_STEP / GIB) / CARD_STEP
    # A length above the one that does not fit is not worth counting.
    length = longest_fitting(lambda n: counter.peak(leanest, batch_size, min(n, seq_len)), card_gib, seq_len)
    if not length:
        return ({"card_gib": card},)
    sold = next((size for size in SOLD_GIB if size >= card), card)
    changes: tuple[dict[str, float], ...] = ({"seq_len": length}, {"card_gib": card})
    return changes if seq_len / length <= sold / card_gib else changes[::-1]


class _Counter:
    """Counts steps of a model, each once. A rung that was built is kept as long as only sizes change."""

    def __init__(self, name: str, config: PretrainedConfig, optimizer: str, show: Callable[[str], None]) -> None:
        self.name, self.config, self.optimizer, self.show = name, config, optimizer, show
        self._peaks: dict[tuple[str, bool, int, int], int] = {}
        self._built: tuple[Rung, Scenario] | None = None

    def peak(self, rung: Rung, batch_size: int, seq_len: int) -> int:
        """The peak in bytes of one training step."""
        key = (rung.method.label, rung.checkpointing, batch_size, seq_len)
        if key not in self._peaks:
            self.show(f"{rung}, {batch_size} x {seq_len} tokens")
            self._peaks[key] = self._count(rung, batch_size, seq_len)
        return self._peaks[key]

    def _count(self, rung: Rung, batch_size: int, seq_len: int) -> int:
        try:
            with progress_bars(False):
                if self._built is None or self._built[0] is not rung:
                    self._built = None
                    scenario = Scenario(self.config, rung.method, rung.checkpointing, self.optimizer, "meta")
                    self._built = rung, scenario
                ledger, _ = self._built[1].count(batch_size, seq_len)
        except Exception as error:  # whatever the model's own code raises
            raise ValueError(
                f"model {self.name!r}: a step of {rung.method.label} cannot be counted ({one_line(error)})"
            ) from error
        return ledger.peaks()["total"].nbytes


@contextmanager
def _shown(progress: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is counted."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("counting {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("", total=None)
        yield lambda text: bar.update(task, description=text)


def _reasons(
    rung: Rung,
    peak: int,
    card_gib: float,
    calibrated_peak: int | None,
    better: Rung | None,
    next_peak: int | None,
    changes: Sequence[Mapping[str, float]],
) -> Iterator[str]:
    leanest = "the leanest settings, " if changes else ""
    yield (
        f"{leanest}{rung}: needs {_needed(peak)} (a peak of {_size(peak)}, {FRAGMENTATION:.0%} of it for "
        f"fragmentation, {CONTEXT_BYTES / GIB:g} GiB for CUDA)"
    )
    if rung.fixed:
        yield "as given: " + ", ".join(f"{key}={rung.settings[key]!r}" for key in rung.fixed)
    yield from map(str, rung.steps)
    if calibrated_peak is not None:
        does = "fits too" if fits(calibrated_peak, card_gib) else "does not fit"
        yield f"{CALIBRATION}; it would need {_needed(calibrated_peak)}, which {does}"
    if better is not None and next_peak is not None:
        yield f"the next better, {better}, would need {_needed(next_peak)}"
    if changes:
        yield f"what would fit: {', or '.join(map(_in_words, changes))}"


def _in_words(change: Mapping[str, float]) -> str:
    [(name, value)] = change.items()
    return {
        "batch_size": f"a batch of {value:g}, with gradients accumulated over more steps for the same update",
        "seq_len": f"sequences of {value:g} tokens",
        "card_gib": f"a card of {value:g} GiB",
    }[name]


def _size(nbytes: int) -> str:
    unit, size = unit_of([nbytes])
    return f"{nbytes / size:.2f} {unit}"


def _needed(peak_bytes: int) -> str:
    """Rounded up, so that what does not fit never reads as if it did."""
    return f"{math.ceil(needed_bytes(peak_bytes) / GIB * 100) / 100:.2f} GiB"


def _check_kind(model: object, counted: PreTrainedModel) -> None:
    """A model may carry a causal language model's config and be another, such as a classifier."""
    if isinstance(model, nn.Module) and not isinstance(model, type(counted)):
        raise ValueError(
            f"{type(model).__name__}: expected a causal language model ({type(counted).__name__}), whose training step "
            "can be counted; choose the settings of another one yourself"
        )
