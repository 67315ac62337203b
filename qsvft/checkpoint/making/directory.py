"""A prepared directory while it is made: finished units, each written whole, and the index at the end.

    .qsvft-preparing.json                 what is being prepared, written first and removed last
    model-00001-of-00131.safetensors      one file a unit; its header names the unit and the plan
    model.safetensors.index.json          written when all units are there; without it nothing is finished
    config.json, tokenizer, ...           written just before it

A file that is begun lies in ``.qsvft-writing`` and gets its place and its name when its bytes are on the disk, so that
a crash, a full disk or a kill leaves whole units and nothing else that counts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils.logging import tqdm

from ...storage.only_process import only_process
from ...storage.tensor_index import INDEX_NAME
from ...storage.tensor_writer import write_tensors
from ...storage.whole_files import check_folder_writable, whole_file
from ..prepared.check import open_file
from ..prepared.digests import CONFIG, TENSORS, TensorRecord, as_text, config_sha256, tensor_record
from ..prepared.record import is_finished

MANIFEST = ".qsvft-preparing.json"
LOCK = ".qsvft-preparing.lock"
WRITING = ".qsvft-writing"
_OURS = ".qsvft-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A finished unit: its file, its tensors as they were written, and the digest of what was read for it."""

    file: str
    tensors: Mapping[str, TensorRecord]
    nbytes: int
    source: str


class Directory:
    """The directory that a checkpoint is prepared into.

    Args:
        folder: the directory; it need not exist.
        units: the names of all units, in the plan's order.
        plan: digest of the plan.
    """

    def __init__(self, folder: str | os.PathLike[str], units: Sequence[str], plan: str) -> None:
        self.folder, self.units, self.plan = Path(folder), tuple(units), plan

    def file_of(self, number: int) -> str:
        """The name of the file of the unit at this place of the plan."""
        return f"model-{number + 1:05d}-of-{len(self.units):05d}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from preparing into the same directory; the lock goes with its process."""
        with only_process(self.folder / LOCK, "preparing", "target"):
            try:
                yield
            finally:
                shutil.rmtree(self.folder / WRITING, ignore_errors=True)

    def manifest(self) -> dict[str, Any] | None:
        """What is being prepared here, None if nothing is."""
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise ValueError(
                f"{path}: {error}; expected the record of a preparation. It is damaged: remove the directory and "
                "prepare again."
            ) from error
        return found

    def begin(self, manifest: dict[str, Any]) -> None:
        """Write down what is being prepared."""
        _write_json(self.folder / MANIFEST, manifest)

    def clear_up(self) -> bool:
        """Whether all was written but the record not removed yet; it is then."""
        left_over = is_finished(self.folder) and self.manifest() is not None
        if left_over:
            (self.folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder / WRITING, ignore_errors=True)
        return left_over

    def check_new(self) -> None:
        """Refuse a directory that holds something already.

        Raises:
            ValueError: it is finished, or it was never a preparation.
            OSError: it cannot be made or written to.
        """
        check_folder_writable(self.folder)
        if is_finished(self.folder):
            raise ValueError(
                f"{self.folder}: a prepared model stands here already; expected a new directory. Load it with "
                "qsvft.from_pretrained(), or remove it, or give another target."
            )
        others = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith(_OURS))
        if self.manifest() is None and others:
            raise ValueError(
                f"{self.folder}: exists and is not empty (it holds {others[0]!r}); expected a new directory, or one in "
                "which a preparation was interrupted. Give another target."
            )

    def finished(self, progress: bool = False) -> dict[str, Record]:
        """The units that are there with the values that were written; what an interrupted writer left is removed.

        Args:
            progress: show a progress bar: all that is finished is read.
        """
        shutil.rmtree(self.folder / WRITING, ignore_errors=True)
        found = {}
        units = tqdm(self.units, desc="checking what is finished", unit="part", leave=False, disable=not progress)
        for number, unit in enumerate(units):
            record = self._record(number, unit)
            if record is not None:
                found[unit] = record
        return found

    def _record(self, number: int, unit: str) -> Record | None:
        path = self.folder / self.file_of(number)
        if not path.is_file():
            return None
        try:
            held = open_file(path)
            metadata = held.shards[path.name].metadata
            if (metadata.get("qsvft_unit"), metadata.get("qsvft_plan")) != (unit, self.plan) or not held.records:
                return None
            held.check(values=True)
        except (ValueError, OSError) as error:
            logger.warning("%s is made again: %s", path.name, error)
            return None
        nbytes = sum(entry.nbytes for entry in held.entries.values())
        return Record(path.name, held.records, nbytes, metadata.get("qsvft_source", ""))

    def write(self, number: int, tensors: dict[str, Tensor], source: str) -> Record:
        """Write a finished unit whole.

        Args:
            number: its place in the plan.
            tensors: by the names that they have in the prepared directory.
            source: digest of what was read for it.
        """
        path = self.folder / self.file_of(number)
        records = {name: tensor_record(tensor) for name, tensor in tensors.items()}
        metadata = {
            "format": "pt",
            "qsvft_unit": self.units[number],
            "qsvft_plan": self.plan,
            "qsvft_source": source,
            TENSORS: as_text(records),
        }
        with whole_file(path, path.parent / WRITING) as temporary:
            _save(tensors, temporary, metadata)
        return Record(path.name, records, sum(tensor.nbytes for tensor in tensors.values()), source)

    def finish(self, records: dict[str, Record], config: dict[str, Any], copied: Sequence[Path]) -> None:
        """Write what makes the directory a model: config, tokenizer, and the index as the last.

        Args:
            records: of all units.
            config: config.json.
            copied: files of the source that come along as they are.
        """
        for source in copied:
            with whole_file(self.folder / source.name, self.folder / WRITING) as temporary:
                shutil.copyfile(source, temporary)
        _write_json(self.folder / "config.json", config)
        tensors = dict(sorted(item for unit in self.units for item in records[unit].tensors.items()))
        weight_map = {name: records[unit].file for unit in self.units for name in records[unit].tensors}
        noted = {
            "total_size": sum(record.nbytes for record in records.values()),
            CONFIG: config_sha256(config),
            TENSORS: tensors,
        }
        _write_json(self.folder / INDEX_NAME, {"metadata": noted, "weight_map": dict(sorted(weight_map.items()))})
        (self.folder / MANIFEST).unlink(missing_ok=True)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        write_tensors(tensors, path, metadata)
    except OSError as error:
        raise OSError(error.errno, f"{path.parent}: {error.strerror}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path, path.parent / WRITING) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
