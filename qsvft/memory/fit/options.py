"""``prepare(model, fit="8GiB")``: what was asked for, turned into options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...options.adapter import OPTIONS
from ...tuner.config import QSVFTConfig
from ..cards import GIB
from .ladder import DEFAULTS
from .recommend import Recommendation, recommend

UNITS = {"gib": GIB, "mib": 2**20, "gb": 10**9, "mb": 10**6}
_MISSING = object()
_SETTINGS = ("card_gib", "seq_len", "batch_size", "optimizer")


def fitting_options(
    model: nn.Module, fit: object, bits: int, options: Mapping[str, Any], progress: bool
) -> dict[str, Any]:
    """The options of ``prepare`` with which a training step of a model fits a card; nothing is changed yet.

    Args:
        model: a causal language model, in bf16 or fp16, or in 4 bits already; with weights or without.
        fit: "8GiB", "8GB" (10**9 bytes each), a number of GiB, a dict with card_gib and, if they are not to
            be 2048, 1 and "adamw", seq_len, batch_size and optimizer, or a :class:`Recommendation`.
        bits: how the base is to be held; 4 is what is counted.
        options: the switches and the fields of :class:`QSVFTConfig` that were given, which stay as they are.
        progress: show a progress bar.

    Returns:
        Those that were given, and those that were chosen.

    Raises:
        ValueError: nothing fits, with the text of the recommendation; another base than one of 4 bits;
            a model in fp32; anything else that :func:`recommend` refuses.
    """
    if bits != 4:
        raise ValueError(f"fit: the step is counted on a base of 4 bits, got bits={bits}; give the options yourself")
    dtype = getattr(model, "dtype", None)
    if dtype == torch.float32:
        raise ValueError(
            f"fit: {type(model).__name__} is in float32, the step is counted in bf16; load it with dtype='bfloat16'"
        )
    given = dict(options)
    if given.get("chunked_loss", False):
        del given["chunked_loss"]  # the default, from which some models are exempt
    found = _checked(fit, given) if isinstance(fit, Recommendation) else _found(model, fit, given, progress)
    if not found.fits:
        raise ValueError(str(found))
    return {**options, **found.options}


def _found(model: nn.Module, fit: object, given: Mapping[str, Any], progress: bool) -> Recommendation:
    return recommend(model, **_settings(fit), progress=progress, **given)


def _checked(found: Recommendation, given: Mapping[str, Any]) -> Recommendation:
    """A recommendation was counted with all its options; others beside it would change its bytes."""
    adapter = {key: value for key, value in found.options.items() if key in OPTIONS}
    counted, switches = vars(QSVFTConfig(**adapter)), {**DEFAULTS, **found.options}

    def differs(key: str, value: Any) -> bool:
        if key in OPTIONS:  # None may mean what was counted
            return vars(QSVFTConfig(**{**adapter, key: value})) != counted
        return bool(switches.get(key, _MISSING) != value)

    other = next((key for key, value in given.items() if differs(key, value)), None)
    if other is not None:
        raise ValueError(
            f"fit: {other}={given[other]!r} is not what the recommendation was counted with; expected it among what "
            f"recommend() was given: recommend(..., {other}={given[other]!r})"
        )
    return found


def _settings(fit: object) -> dict[str, Any]:
    if not isinstance(fit, Mapping):
        return {"card_gib": card_size(fit)}
    unknown = sorted(set(map(str, fit)) - set(_SETTINGS))
    if unknown or "card_gib" not in fit:
        raise ValueError(f"fit: expected card_gib and any of {', '.join(_SETTINGS[1:])}, got {dict(fit)!r}")
    return {**fit, "card_gib": card_size(fit["card_gib"])}


def card_size(size: object) -> float:
    """A card's memory in GiB, of a number of GiB or a text with its unit: "8GiB", "8 GB", "8192 MiB".

    Raises:
        ValueError: neither.
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        return size
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([GM]i?B)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if match is None:
        raise ValueError(
            f"fit: expected a card's size, such as '8GiB' (2**30 bytes each), '8GB' (10**9) or a number of GiB, got "
            f"{size!r}"
        )
    number, unit = match.groups()
    return float(number) * UNITS[unit.lower()] / GIB
