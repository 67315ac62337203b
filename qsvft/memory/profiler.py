"""``qsvft.profile``: count one training step of each method, without weights and without a GPU."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PretrainedConfig

from ..options.choices import CARDS_GIB, DEFAULT_METHODS, OPTIMIZERS
from ..version import __version__
from .cards import GIB, check_cards, needed_bytes
from .methods import Method, parse_method
from .presets import model_config
from .report import MemoryReport
from .rows import Row, row_of
from .scenario import Scenario, one_line
from .shapes import model_without_values

LENGTH_STEP = 128
LONGEST = 2**20
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def profile(
    model_or_config: object,
    methods: Sequence[str | Method] = DEFAULT_METHODS,
    batch_size: int = 1,
    seq_len: int = 2048,
    gradient_checkpointing: bool = True,
    optimizer: str = "adamw",
    device: str = "meta",
    *,
    cards: Sequence[float] = CARDS_GIB,
    max_seq_len_gib: float | None = None,
    progress: bool = False,
) -> MemoryReport:
    """Predict the peak memory of one training step of each method.

    Args:
        model_or_config: a ``PretrainedConfig``, a transformers model (its config is used), a preset's
            name, a local directory or a hub id. No weights are read.
        methods: such as ``"qsvft"``, ``"qlora:64"``, ``"qsvft:rank=1024,pattern=plain"``.
        batch_size: sequences a step.
        seq_len: tokens a sequence.
        gradient_checkpointing: recompute each layer's activations in the backward.
        optimizer: "adamw", "adamw8bit" or "sgd".
        device: "meta" counts without values; "cpu" or "cuda" builds each model with random weights and
            runs the step, which takes as much memory as the step does.
        cards: card sizes in GiB to hold the peaks against.
        max_seq_len_gib: also search the longest sequence that fits a card of this many GiB.
        progress: show a progress bar on stderr, if that is a terminal.

    Returns:
        A :class:`MemoryReport`. A method that cannot run on the model has its reason in its row.

    Raises:
        ValueError: one line: an unknown model, method or option, a size out of its range, a config
            without a causal language model.
    """
    parsed = checked_methods(methods)
    check_settings(batch_size, seq_len, optimizer, device)
    sizes = check_cards(cards)
    limit = None if max_seq_len_gib is None else check_cards([max_seq_len_gib], "longest sequence's card")[0]
    name, config = resolve(model_or_config)
    check_config(name, config)
    report = MemoryReport(
        model=name,
        batch_size=batch_size,
        seq_len=seq_len,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        device=device,
        versions=versions(),
        rows=[],
        cards=sizes,
        max_seq_len_gib=limit,
        position_limit=getattr(config, "max_position_embeddings", None),
    )
    with _bar(parsed, progress) as methods_shown:
        for method in methods_shown:
            report.rows.append(_row(config, method, report))
    return report


def _row(config: PretrainedConfig, method: Method, report: MemoryReport) -> Row:
    try:
        scenario = Scenario(config, method, report.gradient_checkpointing, report.optimizer, report.device)
        ledger, trainable = scenario.count(report.batch_size, report.seq_len)
        row = row_of(method.label, ledger, trainable)
        del ledger
        if report.max_seq_len_gib is not None:
            row.max_seq_len = _longest_of(scenario, report, row.peak_bytes)
        return row
    except Exception as error:  # whatever a method's own package raises belongs in that method's row
        return Row(method.label, error=one_line(error))
    finally:
        if report.device != "meta":  # wrappers are reference cycles, and real ones hold real memory
            gc.collect()


def _longest_of(scenario: Scenario, report: MemoryReport, peak_bytes: int) -> int:
    known = {report.seq_len: peak_bytes}

    def peak_at(length: int) -> int:
        if length not in known:
            ledger, _ = scenario.count(report.batch_size, length)
            known[length] = ledger.peaks()["total"].nbytes
        return known[length]

    assert report.max_seq_len_gib is not None
    return longest_fitting(peak_at, report.max_seq_len_gib, report.seq_len)


def longest_fitting(peak_at: Callable[[int], int], card_gib: float, start: int = LENGTH_STEP) -> int:
    """The longest sequence, in steps of 128 up to 1048576, whose peak fits a card; 0 if none does.

    The peak grows with the length, close to linearly, so that a straight line through two lengths
    tells where to look next; every third look halves the bracket, which bounds their number.

    Args:
        peak_at: the peak in bytes at a length in tokens, growing with it.
        card_gib: the card in GiB; the allowance is taken off.
        start: the length to look at first.
    """
    fit, fail = 0, LONGEST // LENGTH_STEP + 1
    needed: dict[int, int] = {}
    guess = min(max(start // LENGTH_STEP, 1), fail - 1)
    while fail - fit > 1:
        needed[guess] = needed_bytes(peak_at(guess * LENGTH_STEP))
        if needed[guess] <= card_gib * GIB:
            fit = guess
        else:
            fail = guess
        guess = _next_guess(fit, fail, needed, card_gib * GIB)
    return fit * LENGTH_STEP


def _next_guess(fit: int, fail: int, needed: dict[int, int], room: float) -> int:
    """Where to look next, strictly between ``fit`` and ``fail``."""
    open_ended = fail not in needed
    if fit == 0:
        guess = 1
    elif not open_ended and len(needed) % 3 == 0:
        guess = (fit + fail) // 2
    else:
        others = [length for length in needed if length != fit]
        other = min(others, key=lambda length: abs(length - fit), default=None)
        slope = 0.0 if other is None else (needed[fit] - needed[other]) / (fit - other)
        reach = 4 * fit if open_ended else fail
        guess = fit + int((room - needed[fit]) / slope) if slope > 0 else 2 * fit
        guess = min(guess, reach)
    return min(max(guess, fit + 1), fail - 1)


def checked_methods(methods: Sequence[str | Method]) -> list[Method]:
    """Parse methods, each once, and refuse options that no model could take.

    Raises:
        ValueError: one line naming the method.
    """
    if isinstance(methods, str):
        methods = [methods]
    parsed: dict[str, Method] = {}
    for method in methods:
        found = method if isinstance(method, Method) else parse_method(method)
        _check_options(found)
        parsed[found.label] = found
    if not parsed:
        raise ValueError(f"no methods given; expected at least one, such as {', '.join(DEFAULT_METHODS)}")
    return list(parsed.values())


def _check_options(method: Method) -> None:
    if method.name != "qsvft":
        return
    if method.bits not in (4, 16):
        raise ValueError(f"method {method.label!r}: the profiler counts bases of 4 or 16 bits, got bits={method.bits}")
    try:
        method.config()
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {method.label!r}: {one_line(error, name=False)}") from error


def check_settings(batch_size: int, seq_len: int, optimizer: str, device: str) -> None:
    """Refuse sizes and names that no profile could have.

    Raises:
        ValueError: one line naming the argument.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seq_len", seq_len, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
    if device not in ("meta", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; expected meta, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch finds no CUDA device; use device='meta' or 'cpu'")


def resolve(model_or_config: object) -> tuple[str, PretrainedConfig]:
    """A name to show, and a config of our own to build models from.

    Raises:
        ValueError: one line naming what was given.
    """
    if isinstance(model_or_config, (str, os.PathLike)):
        name = os.fspath(model_or_config)
        return name, _without_quantization(_read(name))
    config = model_or_config if isinstance(model_or_config, PretrainedConfig) else None
    if config is None:
        config = getattr(model_or_config, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ValueError(
            f"model: expected a config, a transformers model, a preset's name, a directory or a hub id, got "
            f"{type(model_or_config).__name__}"
        )
    return str(config.name_or_path or config.model_type), _without_quantization(copy.deepcopy(config))


def _read(name: str) -> PretrainedConfig:
    try:
        return model_config(name)
    except ValueError:
        raise
    except Exception as error:  # a config.json can break its reader in any way
        raise ValueError(f"unknown model {name!r}: its config cannot be read ({one_line(error)})") from error


def _without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """The profiler quantises by itself, so a quantised model's config is taken as the full-precision one."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def check_config(name: str, config: PretrainedConfig) -> None:
    """Refuse a config that gives no causal language model with a loss.

    Raises:
        ValueError: one line naming the model.
    """
    try:
        model = model_without_values(copy.deepcopy(config))
    except Exception as error:  # transformers raises what it likes for sizes that do not match
        raise ValueError(f"model {name!r} cannot be built: {one_line(error, name=False)}") from error
    if "labels" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"model {name!r}: {type(model).__name__} takes no labels, so there is no loss to train on")


def versions() -> dict[str, str]:
    """The versions that a report depends on."""
    found = {"qsvft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


@contextmanager
def _bar(methods: Sequence[Method], shown: bool) -> Iterator[Iterator[Method]]:
    console = Console(stderr=True)
    columns = (TextColumn("profiling {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=len(methods))

        def steps() -> Iterator[Method]:
            for method in methods:
                bar.update(task, description=method.label)
                yield method
                bar.advance(task)

        yield steps()
