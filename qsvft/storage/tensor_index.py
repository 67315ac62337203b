"""The index of a checkpoint in several safetensors files: which file holds which tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .headers import Entry, Shard, read_shard
from .json_files import read_object

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
"""The files of a checkpoint, as transformers calls them: the index of several, or the only one."""


def read_index(path: Path) -> tuple[dict[str, str], str]:
    """An index's weight map: the file of each key.

    Names of files must be plain, without a path; the file itself may be a symbolic link to anywhere.

    Returns:
        The map, and the SHA-256 of the index.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: it is no index, or places a tensor elsewhere.
    """
    index, sha256 = read_object(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path}: found {weight_map!r:.80} as its weight_map, expected an object that gives each tensor's file. It "
            "is damaged: copy or download it again."
        )
    for key, name in weight_map.items():
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path}: found {name!r:.200} as the file of {key!r:.200}, expected the plain name of a .safetensors "
                "file in the same folder, without a path. Do not use this checkpoint, or correct the index."
            )
    return weight_map, sha256


def read_shards(index: Path, weight_map: dict[str, str]) -> tuple[dict[str, Shard], dict[str, Entry]]:
    """Read the headers of the shards that an index names.

    Args:
        index: the index; the shards lie beside it.
        weight_map: what it says.

    Returns:
        The files by name, and all tensors by key.

    Raises:
        OSError: a shard is missing or cannot be read.
        ValueError: a shard is damaged, a key stands in two of them, or they and the index do not agree.
    """
    shards: dict[str, Shard] = {}
    entries: dict[str, Entry] = {}
    listed: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        listed.setdefault(name, set()).add(key)
    for name in sorted(listed):
        shards[name], found = read_shard(index.parent / name)
        if repeated := found.keys() & entries.keys():
            raise ValueError(
                f"{index.parent / name}: found {first_few(repeated)}, which {entries[min(repeated)].file} has as well; "
                "expected each tensor once. The shards are of different checkpoints: copy or download them again."
            )
        entries |= found
        for keys, what in (
            (listed[name] - found.keys(), f"found no {{}}, which {index.name} places in it"),
            (found.keys() - listed[name], f"found {{}}, which {index.name} does not place in it"),
        ):
            if keys:
                raise ValueError(
                    f"{index.parent / name}: {what.format(first_few(keys))}. Expected the shards and the index of one "
                    "checkpoint: copy or download them again."
                )
    return shards, entries


def first_few(names: Iterable[str]) -> str:
    """Some names and how many there are, for a message."""
    names = sorted(names)
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more ({len(names)} in all)"


def is_plain(name: Any) -> bool:
    """Whether a name is that of a file in the folder itself, however a system reads it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
