"""Whether a prepared directory is whole, and what it was when it was written.

Always checked, by headers and what is small: every tensor is there once, with the dtype and shape that it had;
quantised weights have all their parts, in the format's own NF4; config.json is the one it was made with; tensors of at
most :data:`SMALL_BYTES` (norms, biases, the states and maps of quantised weights) have their values. With
``values=True`` all have. What a directory from before digests has of this is checked there too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils.logging import tqdm

from ...storage.digests import tensor_bytes
from ...storage.headers import Entry, Shard, read_shard
from ...storage.json_files import parse_object, read_object
from ...storage.tensor_files import TensorFiles
from ...storage.tensor_index import INDEX_NAME, SINGLE_NAME, first_few, read_index, read_shards
from ...storage.tensor_writer import DTYPE_NAMES
from .digests import CONFIG, TENSORS, TensorRecord, as_records, config_sha256, tensor_sha256

SMALL_BYTES = 2**14
"""Tensors of at most so many bytes are compared whenever a directory is read."""

STATE = ".quant_state.bitsandbytes__nf4"
_NF4 = {"quant_type": "nf4", "blocksize": 64, "nested_blocksize": 256, "nested_dtype": "float32"}
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
_AGAIN = "Copy the directory again, or prepare the checkpoint again."


@dataclass(frozen=True)
class Prepared:
    """The files of a prepared directory, by their headers.

    Attributes:
        folder: the directory.
        shards: the files, by name.
        entries: the tensors, by name.
        noted: metadata of the index, empty where there is none.
    """

    folder: Path
    shards: Mapping[str, Shard]
    entries: Mapping[str, Entry]
    noted: Mapping[str, Any]

    def check(self, values: bool = False, progress: bool = False) -> None:
        """Refuse a directory that is not what was written.

        Args:
            values: compare all values, not only those of small tensors: everything is read.
            progress: show a progress bar.

        Raises:
            ValueError: naming the file and what is another, twice or not there.
        """
        self._check_records()
        notes = (self.noted, *(shard.metadata for shard in self.shards.values()))
        _check_config(self.folder, [one.get(CONFIG) for one in notes])
        self._check_values(values, progress)
        parts = {name.removesuffix(part) for name in self.entries for part in _PARTS if name.endswith(part)}
        for weight in sorted(parts):
            self._check_nf4(weight)
        for name in self.entries:
            if name.endswith(".SCB"):
                self._check_int8(name.removesuffix(".SCB"))

    def quantised_shape(self, layer: str) -> list[int] | None:
        """The shape (m, n) of a layer's weight, where it is held in 4 or 8 bits; None where it is not."""
        weight = f"{layer}.weight"
        if weight + STATE in self.entries:
            shape: list[int] = self._state(weight)["shape"]
            return shape
        return list(self.entries[weight].shape) if f"{layer}.SCB" in self.entries else None

    @cached_property
    def files(self) -> TensorFiles:
        """The same files, to read from."""
        return TensorFiles({name: self.folder / entry.file for name, entry in self.entries.items()})

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        """What every tensor was when it was written; empty in a directory from before.

        Raises:
            ValueError: they cannot be read, or those of two files contradict each other.
        """
        found: dict[str, TensorRecord] = {}
        noted = {INDEX_NAME: self.noted, **{file: shard.metadata for file, shard in self.shards.items()}}
        for file, metadata in noted.items():
            try:
                records = as_records(metadata.get(TENSORS, {}))
            except ValueError as error:
                raise self._wrong(file, str(error), "those that it was written with") from error
            other = next((name for name in records if found.get(name, records[name]) != records[name]), None)
            if other is not None:
                raise self._wrong(file, f"{other!r} noted otherwise than in another file", "files of one directory")
            found |= records
        return found

    def _check_records(self) -> None:
        if not self.records:
            return
        if missing := self.records.keys() - self.entries.keys():
            raise self._wrong("", f"no {first_few(missing)} in its files", "each tensor that was written")
        if added := self.entries.keys() - self.records.keys():
            file = self.entries[min(added)].file
            raise self._wrong(file, f"{first_few(added)}, which was not written into it", "the tensors that were")
        for name, (dtype, shape, _) in self.records.items():
            entry = self.entries[name]
            if (DTYPE_NAMES[entry.dtype], list(entry.shape)) != (dtype, list(shape)):
                found = f"{name!r} as {DTYPE_NAMES[entry.dtype]} of shape {list(entry.shape)}"
                raise self._wrong(entry.file, found, f"{dtype} of shape {list(shape)}, as it was written")

    def _check_values(self, all_of_them: bool, progress: bool) -> None:
        names = [name for name in self.records if all_of_them or self.entries[name].nbytes <= SMALL_BYTES]
        names.sort(key=lambda name: (self.entries[name].file, self.entries[name].start))
        with tqdm(
            total=sum(self.entries[name].nbytes for name in names),
            desc="comparing values",
            unit="B",
            unit_scale=True,
            disable=not (progress and all_of_them),
        ) as bar:
            for name in names:
                if tensor_sha256(self.files.mapped(name)) != self.records[name].sha256:
                    raise self._wrong(self.entries[name].file, f"other values in {name!r}", "those that were written")
                bar.update(self.entries[name].nbytes)

    def _check_nf4(self, weight: str) -> None:
        """A weight in NF4 has its parts, and its state says what the format fixes."""
        if weight + STATE not in self.entries:
            raise self._wrong("", f"no {weight + STATE}", "every part of a weight in NF4")
        entry, state = self.entries[weight + STATE], self._state(weight)
        for field, expected in _NF4.items():
            if state.get(field) != expected:
                raise self._wrong(entry.file, f"{field} = {state.get(field)!r} of {weight}", f"{expected!r}")
        offset, shape = state.get("nested_offset"), state.get("shape")
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise self._wrong(entry.file, f"nested_offset = {offset!r} of {weight}", "a finite number")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise self._wrong(entry.file, f"shape = {shape!r:.80} of {weight}", "two whole numbers")
        numbers = math.prod(shape)
        blocks = -(-numbers // 64)
        sizes = {"": -(-numbers // 2), ".absmax": blocks, ".quant_map": 64}
        sizes |= {".nested_absmax": 4 * -(-blocks // 256), ".nested_quant_map": 1024}
        for part, nbytes in sizes.items():
            self._check_size(weight + part, nbytes, f"as {shape} in NF4 needs")

    def _state(self, weight: str) -> dict[str, Any]:
        name = weight + STATE
        return parse_object(
            bytes(tensor_bytes(self.files.mapped(name))), f"{self.folder / self.entries[name].file}: {name}"
        )

    def _check_int8(self, layer: str) -> None:
        """A weight in int8 has a scale for each row."""
        entry = self.entries.get(f"{layer}.weight")
        if entry is None or len(entry.shape) != 2 or DTYPE_NAMES[entry.dtype] != "I8":
            raise self._wrong("", f"no {layer}.weight of int8", "the weight of each scale (SCB)")
        self._check_size(f"{layer}.SCB", 4 * entry.shape[0], "one in float32 for each row of the weight")

    def _check_size(self, name: str, nbytes: int, why: str) -> None:
        entry = self.entries.get(name)
        if entry is None:
            raise self._wrong("", f"no {name}", "every part of a quantised weight")
        if entry.nbytes != nbytes:
            raise self._wrong(entry.file, f"{entry.nbytes} bytes of {name}", f"{nbytes}, {why}")

    def _wrong(self, file: str, found: str, expected: str) -> ValueError:
        return ValueError(f"{self.folder / file}: found {found}; expected {expected}. {_AGAIN}")


def open_file(path: Path) -> Prepared:
    """One file of a prepared directory by itself, with :func:`open_prepared`'s errors."""
    shard, entries = read_shard(path)
    return Prepared(path.parent, {path.name: shard}, entries, {})


def open_prepared(folder: str | os.PathLike[str]) -> Prepared:
    """Read the headers of a prepared directory.

    Raises:
        OSError: a file is missing, or cannot be read.
        ValueError: a file is damaged, or a tensor stands in two.
    """
    folder = Path(folder)
    if (folder / SINGLE_NAME).is_file():
        return open_file(folder / SINGLE_NAME)
    if not (folder / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{folder}: expected {INDEX_NAME} or {SINGLE_NAME} in it, found neither")
    weight_map, _ = read_index(folder / INDEX_NAME)
    noted = read_object(folder / INDEX_NAME)[0].get("metadata")
    shards, entries = read_shards(folder / INDEX_NAME, weight_map)
    return Prepared(folder, shards, entries, noted if isinstance(noted, dict) else {})


def check_config(folder: str | os.PathLike[str]) -> None:
    """Refuse a directory whose config.json is another than it was written with, before a model is built of it.

    Raises:
        OSError: a file is missing, or cannot be read.
        ValueError: a file is damaged, or the config is another.
    """
    folder = Path(folder)
    noted: Any = None
    first = SINGLE_NAME
    if not (folder / SINGLE_NAME).is_file():
        weight_map, _ = read_index(folder / INDEX_NAME)
        noted, first = read_object(folder / INDEX_NAME)[0].get("metadata"), min(weight_map.values())
    known = noted.get(CONFIG) if isinstance(noted, dict) else None
    _check_config(folder, [known or read_shard(folder / first)[0].metadata.get(CONFIG)])


def _check_config(folder: Path, noted: Sequence[Any]) -> None:
    path, known = folder / "config.json", [one for one in noted if one is not None]
    found = config_sha256(read_object(path)[0]) if known and path.is_file() else None
    if found is not None and any(one != found for one in known):
        raise ValueError(
            f"{path}: found another config than the directory was written with; expected the same, since what the "
            "model computes depends on it. Restore it, or prepare the checkpoint again. (Options of a run are given to "
            "from_pretrained(), not written here.)"
        )
