"""``info``: what a prepared directory or an adapter is, whether it is whole, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoint.making.directory import MANIFEST
from .checkpoint.prepared.check import Prepared, open_prepared
from .checkpoint.prepared.record import prepared_record
from .storage.factor_files import FactorFiles
from .storage.headers import read_shard
from .storage.json_files import read_object
from .storage.tensor_files import TensorFiles
from .storage.weights import all_finite
from .tuner.adapter_file import is_m
from .tuner.config import QSVFTConfig

_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def info(folder: Path, verify: bool = False) -> list[tuple[str, str]]:
    """Say what a directory holds, in lines of a name and a text.

    Args:
        folder: a prepared directory, or one with an adapter.
        verify: read every tensor of a prepared one, and compare its values with those that were written.

    Raises:
        ValueError: it is neither, or is not whole; the message names the file.
    """
    return list(_of_adapter(folder) if (folder / _ADAPTER).is_file() else _of(folder, verify))


def _of(folder: Path, verify: bool) -> Iterator[tuple[str, str]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: found no such directory; expected one that qsvft or PEFT wrote")
    if (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder}: found a preparation that was interrupted; expected a finished one. Run the same again to go on."
        )
    config, _ = read_object(folder / "config.json")
    record = prepared_record(config)
    if record is None:
        raise ValueError(
            f"{folder}: found a model that qsvft did not prepare; expected a prepared directory or an adapter. Prepare "
            f"it: qsvft prepare {folder} TARGET."
        )
    classes = config.get("architectures") or [config.get("model_type")]
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
        raise ValueError(
            f"{folder / 'config.json'}: found architectures={classes!r}, expected names of classes. Copy the directory "
            "again, or prepare the checkpoint again."
        )
    held = open_prepared(folder)
    held.check(values=verify, progress=verify)
    yield "prepared", f"{', '.join(classes)}, {_size(held)}"
    yield "weights", f"{record.get('bits')} bits, {record.get('compute_dtype')} before"
    yield "factors", _factors(FactorFiles(held.files.paths))
    yield "made by", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    yield "whole", _how_sure(held, verify)
    yield "to load", f"qsvft.from_pretrained({str(folder)!r})"


def _of_adapter(folder: Path) -> Iterator[tuple[str, str]]:
    fields, _ = read_object(folder / _ADAPTER)
    if fields.get("peft_type") != "QSVFT":
        raise ValueError(
            f"{folder / _ADAPTER}: found an adapter of the type {fields.get('peft_type')!r}; expected 'QSVFT'. Load it "
            "with PEFT."
        )
    config = QSVFTConfig.from_pretrained(str(folder))
    _, entries = read_shard(folder / _ADAPTER_WEIGHTS)
    files = TensorFiles.from_file(folder / _ADAPTER_WEIGHTS)
    M = [name for name in entries if is_m(name)]
    if not M:
        raise ValueError(
            f"{folder / _ADAPTER_WEIGHTS}: found no M in it; expected one a layer. Save the adapter again."
        )
    if broken := next((name for name in M if not all_finite(files.read(name))), None):
        raise ValueError(
            f"{folder / _ADAPTER_WEIGHTS}: found NaN or Inf in {broken}; expected finite numbers. Train again from an "
            "earlier checkpoint."
        )
    numbers = sum(entries[name].nbytes // 4 for name in M)
    base, bits = config.base_model_name_or_path, config.held_base().get("bits")
    yield "adapter", f"{numbers:,} numbers in {len(M)} layers{_whole(config)}"
    yield "form", ", ".join(f"{name} {getattr(config, name)}" for name in ("pattern", "rank", "basis", "sides"))
    yield "base", f"{base or 'not named'}{f', in {bits} bits' if bits else ''}"
    yield "factors", "in the adapter" if config.include_factors else "of the base, compared when it is loaded"
    yield "whole", "M is finite; its digests are compared when it is loaded onto its base"
    yield "to load", f"qsvft.load({str(folder)!r}{'' if base else ', base=BASE'})"


def _whole(config: QSVFTConfig) -> str:
    return f", and {', '.join(config.modules_to_save)} whole" if config.modules_to_save else ""


def _size(held: Prepared) -> str:
    nbytes = sum(shard.nbytes for shard in held.shards.values())
    return f"{len(held.entries)} tensors in {len(held.shards)} files, {nbytes / 2**30:.2f} GiB"


def _factors(files: FactorFiles) -> str:
    keys: list[tuple[str, Any]] = files.keys()
    if not keys:
        return "none: for adapters whose directions come from data"
    ranks = [files.rank(layer, key) for layer, key in keys]
    kinds = ", ".join(sorted({str(key) for _, key in keys}))
    return f"{kinds} of {len({layer for layer, _ in keys})} layers, {min(ranks)} to {max(ranks)} directions"


def _how_sure(held: Prepared, verified: bool) -> str:
    if not held.records:
        return "in its structure; it was written before there were digests of values"
    return "yes, every value" if verified else "in its structure and small tensors (--verify compares every value)"
