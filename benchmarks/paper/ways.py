"""The ways to fine-tune: full, PEFT's methods through PEFT, and this package's, on the same base."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft import PeftConfig, PeftModel
from torch import nn

import qsvft

from .experiment import HEAD, OURS, WHOLE, Method

Batches = Sequence[dict[str, torch.Tensor]]
HEADS = ("modules_to_save", "classifier", "pooler", "score")
Load = Callable[[str | None], nn.Module]


def config_of(method: Method, task_type: str | None) -> PeftConfig:
    """PEFT's config of a method.

    Raises:
        ValueError: PEFT has no such method, or it does not take such options.
    """
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(method.way)
    if kind is None:
        known = ", ".join(sorted(str(getattr(one, "value", one)) for one in peft.PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(
            f"{method.name}: way: found {method.way!r}; expected one of {', '.join(WHOLE)}, or of PEFT's: {known}"
        )
    try:
        return kind(task_type=task_type, **copy.deepcopy(dict(method.options)))  # PEFT adds to the lists in it
    except (TypeError, ValueError) as error:
        raise ValueError(f"{method.name}: options: {' '.join(str(error).split())}") from error


def make(
    method: Method, name: str, load: Load, task_type: str | None, batches: Callable[[], Batches], checkpointing: bool
) -> nn.Module:
    """The model to train.

    Args:
        name: of the base, a hub id or a directory.
        load: gives the base anew in a dtype.
        task_type: PEFT's.
        batches: gives those of a calibration.
        checkpointing: whether activations are to be computed again in the backward.
    """
    if method.way == OURS:
        shown = sys.stderr.isatty()
        options = {**method.options, "gradient_checkpointing": checkpointing, "progress": shown}
        seen = batches() if method.calibration else None
        if task_type == "CAUSAL_LM":
            return qsvft.from_pretrained(name, method.bits, calibration=seen, dtype=method.dtype, **options)
        return qsvft.prepare(load(method.dtype), method.bits, calibration=seen, task_type=task_type, **options)
    if method.way in WHOLE:
        return trains_whole(load(method.dtype), method)
    with known_notices():
        return peft.get_peft_model(_held(method, load), config_of(method, task_type))


def trains_whole(base: nn.Module, method: Method) -> nn.Module:
    """A base all of whose parameters train, or those of its head alone."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(method.way != HEAD or is_head(name))
    return base


def trained_again(method: Method, folder: Path, load: Load) -> nn.Module:
    """What was trained, from where it was saved."""
    if method.way in WHOLE:
        return load(None)
    if method.way == OURS:
        return qsvft.load(folder)
    with known_notices():
        return PeftModel.from_pretrained(_held(method, load), str(folder))


def _held(method: Method, load: Load) -> nn.Module:
    """The base as a method holds it; a fresh head stays as it is."""
    base = load(method.dtype)
    return base if method.bits == 16 else qsvft.quantize(base, method.bits, list(HEADS), progress=False)


@contextmanager
def known_notices() -> Iterator[None]:
    """Without PEFT's notice that BOFT's CUDA extension could not be compiled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="peft.tuners.boft")
        yield


def is_head(name: str) -> bool:
    """Whether a parameter is of a fresh head, which the paper does not count."""
    return any(part in HEADS for part in name.split("."))
