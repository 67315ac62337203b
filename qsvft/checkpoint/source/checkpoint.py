"""A checkpoint to be prepared: which tensors it has, and each of them on demand.

Opening reads the headers alone and checks them; a tensor is mapped into memory when it is asked for, and by
itself: what was read before is let go with its tensor. Nothing of the source is ever opened for writing.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...storage.headers import Entry, Shard, read_shard
from ...storage.json_files import read_object
from ...storage.tensor_index import SINGLE_NAME, first_few, read_index, read_shards
from .hub import SMALL_FILES, Repository
from .index import CONFIG, HOW_TO_CONVERT, weights_file

__all__ = ["Checkpoint", "Entry", "Shard", "first_few", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A view of a safetensors checkpoint. It holds no file open, and can be sent to another process.

    Attributes:
        name: the source as it was given.
        folder: the local directory that holds ``config.json`` and the shards.
        entries: every tensor, by its key in the checkpoint.
        shards: the files as they were when they were opened, by name.
        config_sha256: of ``config.json``.
        index_sha256: of the index; None if there is none.
    """

    name: str
    folder: Path
    entries: dict[str, Entry]
    shards: dict[str, Shard]
    config_sha256: str
    index_sha256: str | None

    def read(self, key: str) -> Tensor:
        """A tensor as it is stored, on the CPU, mapped from the file.

        Writing to it changes a private copy, never the file.

        Raises:
            KeyError: the checkpoint has no such key.
            ValueError: its file changed since the checkpoint was opened.
        """
        entry = self.entries[key]
        return self._map(entry, 0, entry.nbytes).reshape(entry.shape)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (first dimension) of a tensor with one dimension or more, as :meth:`read`."""
        entry = self.entries[key]
        rows = entry.shape[0]
        start, stop = min(start, rows), min(stop, rows)
        row = entry.nbytes // max(rows, 1)
        return self._map(entry, start * row, (stop - start) * row).reshape(stop - start, *entry.shape[1:])

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from another, as JSON: no tensor is read for it.

        Returns:
            ``files`` (per shard ``bytes``, ``mtime_ns``, ``header_sha256``), ``config_sha256``, ``index_sha256``.
        """
        files = {
            name: {"bytes": shard.nbytes, "mtime_ns": shard.mtime_ns, "header_sha256": shard.header_sha256}
            for name, shard in self.shards.items()
        }
        return {"files": files, "config_sha256": self.config_sha256, "index_sha256": self.index_sha256}

    def check_unchanged(self) -> None:
        """Look whether every shard has the size and the time that it had.

        Raises:
            ValueError: one has not, or is gone; the message names it.
        """
        for name in self.shards:
            self._check_unchanged(name)

    def _check_unchanged(self, name: str) -> None:
        path, known = self.folder / name, self.shards[name]
        try:
            status = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: gone since the checkpoint was opened ({error}). Put it back.") from error
        if (status.st_size, status.st_mtime_ns) != (known.nbytes, known.mtime_ns):
            raise ValueError(
                f"{path}: changed since the checkpoint was opened: found {status.st_size} bytes, last changed at "
                f"{status.st_mtime_ns} ns; expected {known.nbytes} bytes and {known.mtime_ns} ns. Put it back as it "
                "was, or begin anew."
            )

    def _map(self, entry: Entry, start: int, length: int) -> Tensor:
        """Bytes of a tensor as a flat tensor of its dtype."""
        self._check_unchanged(entry.file)
        if length == 0:
            return torch.empty(0, dtype=entry.dtype)
        begin = entry.start + start
        with open(self.folder / entry.file, "rb") as file:
            data = _mapped(file, begin, length)
        if begin % entry.dtype.itemsize:
            data = data.clone()  # headers of odd length are allowed; torch wants whole elements
        return data.view(entry.dtype)


def _mapped(file: BinaryIO, begin: int, length: int) -> Tensor:
    """Bytes of a file, mapped where the file system can, else read.

    Only these bytes are mapped, not the file: what was touched of it would count as ours until it is closed.
    """
    page = begin - begin % mmap.ALLOCATIONGRANULARITY
    buffer: mmap.mmap | bytearray
    try:
        buffer = mmap.mmap(file.fileno(), begin - page + length, access=mmap.ACCESS_COPY, offset=page)
    except OSError:
        page, buffer = begin, bytearray(length)
        file.seek(begin)
        if file.readinto(buffer) < length:  # type: ignore[attr-defined]
            raise ValueError(f"{file.name}: shrank while it was read. Put it back as it was, or begin anew.") from None
    return torch.frombuffer(buffer, dtype=torch.uint8, offset=begin - page, count=length)


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open a checkpoint in safetensors format.

    As transformers does, ``model.safetensors`` is taken before ``model.safetensors.index.json``, and other files
    are left aside. The names of shards in an index must be plain file names of the same folder; a file may be a
    symbolic link to anywhere, as in the hub's cache.

    Args:
        source: a directory, one ``.safetensors`` file beside its ``config.json``, or a model's id on the hub.
        revision: branch, tag or commit on the hub.
        cache_dir: where the hub's files are kept.
        token: for the hub.
        local_files_only: take what the cache has, without asking the hub.

    Raises:
        OSError: a file is missing or cannot be read, or the hub does not give the model.
        ValueError: what was found is no whole checkpoint; the message names the file and what is wrong with it.
    """
    given = os.fspath(source)
    if not given:
        raise ValueError("source: found an empty name, expected a directory, a .safetensors file or a model's id.")
    path, repository = Path(given), None
    if not path.exists():
        repository = Repository(given, revision, cache_dir, token, local_files_only)
        path = repository.fetch([*SMALL_FILES, SINGLE_NAME])
        repository = repository.pinned(path)
    path = path.absolute()
    folder, name = (path, None) if path.is_dir() else (path.parent, path.name)
    if name is not None and not name.endswith(".safetensors"):
        raise ValueError(
            f"{path}: found something that does not end in .safetensors, expected a directory, a .safetensors file or "
            f"a model's id on the hub. {HOW_TO_CONVERT}"
        )
    config, config_sha256 = read_object(folder / CONFIG)
    name = name or weights_file(folder, config)
    if not name.endswith(".index.json"):
        if repository is not None and name != SINGLE_NAME:
            repository.fetch([name])
        shard, entries = read_shard(folder / name)
        shards, index_sha256 = {name: shard}, None
    else:
        weight_map, index_sha256 = read_index(folder / name)
        if repository is not None:
            repository.fetch(sorted(set(weight_map.values())))
        shards, entries = read_shards(folder / name, weight_map)
    if not entries:
        raise ValueError(f"{folder / name}: found no tensors, expected a model's weights. Is it the right file?")
    return Checkpoint(given, folder, entries, shards, config_sha256, index_sha256)
