"""The base of a run: which it is, how it is held, and which options of the adapter follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.prepared.record import read_record, recorded_options
from ..memory.profiler import resolve
from ..options.adapter import OPTIONS
from ..options.recipe import Recipe
from ..tuner.calibration import with_basis
from ..tuner.config import QSVFTConfig


@dataclass(frozen=True)
class Base:
    """See the module.

    Attributes:
        name: a directory or a hub id.
        bits: 4, 8 or 16.
        dtype: before it is quantised; None as it is.
        calibration: batches that U and V come from; 0 for none.
        given: fields of a new adapter's config, for :func:`qsvft.from_pretrained`.
        held: all fields that differ from the defaults, those of a prepared directory or of a trained adapter as well.
    """

    name: str
    bits: int
    dtype: str | None
    calibration: int
    given: dict[str, Any]
    held: dict[str, Any]


def base_of(recipe: Recipe) -> Base:
    """The base that a recipe names, or that the adapter names with which it goes on.

    Raises:
        ValueError: there is none, or its config cannot be read.
    """
    run = recipe.run
    if run.adapter is not None:
        adapter = QSVFTConfig.from_pretrained(run.adapter)
        name, held = run.model or adapter.base_model_name_or_path, adapter.held_base()
        if not name:
            raise ValueError(f"adapter {run.adapter!r}: names no base; expected one. Give --model.")
        fields = {option: getattr(adapter, option) for option in OPTIONS}
        return Base(name, held.get("bits", run.bits), run.dtype, 0, {}, fields)
    assert run.model is not None
    record = read_record(run.model)
    if record is None:
        given = with_basis(recipe.adapter, run.calibration or None, run.bits == 4)
        return Base(run.model, run.bits, run.dtype or _lean_dtype(run.model), run.calibration, given, given)
    recorded = recorded_options(record)
    calibration = run.calibration
    if "calibration" not in recipe.given and recorded.get("basis") != "data":
        calibration = 0  # its factors are there to be used
    # What rounding took from the weights is not known of a prepared directory.
    given = with_basis(recipe.adapter, calibration or None, residual=False)
    bits = record.get("bits", 4)
    if recipe.given.get("bits", bits) != bits:
        raise ValueError(
            f"model {run.model}: holds its weights in {bits} bits, bits={run.bits} was asked for. Leave bits out, or "
            "give the original checkpoint."
        )
    return Base(run.model, bits, run.dtype, calibration, given, {**recorded, **given})


def _lean_dtype(name: str) -> str | None:
    """bf16 for a checkpoint in fp32, of which twice as much would be held and moved."""
    return "bfloat16" if getattr(resolve(name)[1], "dtype", None) == torch.float32 else None
