"""What says that a directory is a prepared one: ``quantization_config`` in its config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...options.adapter import FACTOR_FIELDS
from ...storage.tensor_index import INDEX_NAME, SINGLE_NAME
from ...tuner.removed import without_removed

METHOD = "qsvft"
"""The ``quant_method`` of a prepared model."""


def prepared_record(config: object) -> dict[str, Any] | None:
    """What a prepared model's config, or config.json, says of how it was prepared; None for any other."""
    fields = config if isinstance(config, Mapping) else {}
    record = fields.get("quantization_config") or getattr(config, "quantization_config", None)
    return record if isinstance(record, dict) and record.get("quant_method") == METHOD else None


def is_finished(folder: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a whole prepared model."""
    whole = any((Path(folder) / name).is_file() for name in (INDEX_NAME, SINGLE_NAME))
    return whole and read_record(folder) is not None


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What a directory's config.json says of how it was prepared; None where it says nothing."""
    try:
        return prepared_record(json.loads((Path(folder) / "config.json").read_bytes()))
    except (OSError, ValueError):
        return None


def recorded_fields(adapter: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a :class:`~qsvft.QSVFTConfig` in a record's ``adapter``.

    Raises:
        ValueError: an option that this version does not have, or no such fields at all.
    """
    if not isinstance(adapter, Mapping):
        raise ValueError(
            f"{where}: found adapter = {adapter!r:.80}, expected an object with the fields of a QSVFTConfig. It is "
            "damaged: copy the directory again, or prepare the checkpoint again."
        )
    return without_removed(adapter, where, "Use the version that made it, or prepare the checkpoint again.")


def recorded_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a :class:`~qsvft.QSVFTConfig` that a directory was prepared for."""
    adapter = record.get("adapter") or {}
    options = {name: value for name, value in adapter.items() if name in FACTOR_FIELDS}
    if options.get("decomposition") == "auto" and options.get("rank", 0) is None and not options.get("rank_pattern"):
        options["decomposition"] = "exact"  # what it was for all directions: a smaller rank reads the first of them
    return options
