"""What stands in a safetensors file, by its header alone: names, dtypes, shapes and where the bytes are.

The header is read by ourselves, since JSON that repeats a name must not pass: readers differ in which of the two
they take. Everything a header says is checked against the file before anything is read by it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .json_files import parse_object, require_file
from .tensor_writer import DTYPES

MAX_HEADER_BYTES = 100_000_000
"""The longest header that is read: safetensors' own limit."""

MAX_DIMENSIONS = 64
"""The most dimensions of a tensor: what torch can build."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        file: the file's name in the checkpoint's folder.
        dtype: as it is stored.
        shape: as it is stored.
        nbytes: its size.
        start: where in the file it begins, in bytes.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    start: int


@dataclass(frozen=True)
class Shard:
    """A file as it was when it was opened: size in bytes, time of its last change, SHA-256 and notes of its header."""

    nbytes: int
    mtime_ns: int
    header_sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_shard(path: Path) -> tuple[Shard, dict[str, Entry]]:
    """Read a safetensors file's header.

    Args:
        path: the file; a symbolic link is followed.

    Returns:
        The file's size, time and header digest, and its tensors in the order in which they lie.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: it is no whole safetensors file, or what its header says cannot be; the message names the file.
    """
    status = require_file(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > status.st_size - 8:
            raise _damaged(
                path,
                f"a file of {status.st_size} bytes whose first eight announce a header of {length} bytes",
                "a header within the file",
            )
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES}")
        raw = file.read(length)
    if len(raw) < length or not raw.startswith(b"{"):
        raise _damaged(path, f"{len(raw)} bytes of header beginning with {raw[:8]!r}", f"{length} beginning with '{{'")
    header = parse_object(raw, f"the header of {path}")
    metadata = _checked_metadata(path, header.pop("__metadata__", {}))
    entries = {key: _entry(path, key, value, 8 + length) for key, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    _check_extent(path, entries, 8 + length, status.st_size)
    return Shard(status.st_size, status.st_mtime_ns, hashlib.sha256(raw).hexdigest(), metadata), entries


def _checked_metadata(path: Path, metadata: Any) -> dict[str, str]:
    kind = metadata.get("format", "pt") if isinstance(metadata, dict) else metadata
    if kind not in ("pt", "mlx"):
        raise ValueError(
            f"{path}: found tensors of format {kind!r} in the header's __metadata__, expected 'pt'. Load the "
            "checkpoint with transformers in the framework that wrote it, and save it from PyTorch (save_pretrained)."
        )
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"the __metadata__ {_short(metadata)}", "an object of strings")
    return metadata


def _entry(path: Path, key: str, value: Any, data: int) -> Entry:
    fields = value if isinstance(value, dict) else {}
    kind, shape, offsets = fields.get("dtype"), _naturals(fields, "shape"), _naturals(fields, "data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(
            f"{path}: found {key!r} of dtype {kind!r}, expected one of {', '.join(DTYPES)}. A quantised checkpoint "
            "cannot be prepared: use the one that it was made from, in 16 or 32 bits."
        )
    if shape is None or len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > 2**63 - 1:
        raise _damaged(
            path,
            f"{key!r} of shape {_short(fields.get('shape'))}",
            f"at most {MAX_DIMENSIONS} whole numbers that torch can hold",
        )
    nbytes = math.prod(shape) * DTYPES[kind].itemsize
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise _damaged(
            path,
            f"{key!r} at {_short(fields.get('data_offsets'))}",
            f"an extent of {nbytes} bytes, as {kind} {_short(shape)} needs",
        )
    return Entry(path.name, DTYPES[kind], tuple(shape), nbytes, data + offsets[0])


def _check_extent(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """Tensors lie one after another and fill the file."""
    position = data
    for key, entry in entries.items():
        if entry.start != position:
            raise _damaged(path, f"{key!r} at byte {entry.start}", f"byte {position}, where the tensor before it ends")
        position += entry.nbytes
    if position != size:
        raise _damaged(path, f"{size} bytes", f"{position}, as its header says")


def _naturals(fields: dict[str, Any], name: str) -> list[int] | None:
    value = fields.get(name)
    return value if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _damaged(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{path}: not a whole safetensors file: found {found}; expected {expected}. It is truncated or damaged: copy "
        "or download it again."
    )
