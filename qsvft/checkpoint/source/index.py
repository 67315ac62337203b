"""Which files a checkpoint consists of, and what stands in them by their headers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...storage.tensor_index import INDEX_NAME, SINGLE_NAME, is_plain
from .headers import Entry, Shard, read_shard

CONFIG = "config.json"

HOW_TO_CONVERT = (
    "Convert a checkpoint of another format once: load it with transformers (from_pretrained) and save it with "
    "save_pretrained(), which writes safetensors."
)

_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def weights_file(folder: Path, config: dict[str, Any]) -> str:
    """The name of the single file or of the index, chosen as transformers chooses.

    Args:
        folder: the checkpoint's.
        config: its ``config.json``, which may name the file (``transformers_weights``).

    Raises:
        OSError: there is neither.
        ValueError: the config names a file elsewhere.
    """
    named = config.get("transformers_weights")
    if named is not None:
        if not is_plain(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(
                f"{folder / CONFIG}: found transformers_weights = {named!r}, expected the plain name of a .safetensors "
                "file or of a .safetensors.index.json in the same folder. Correct it."
            )
        return str(named)
    for name in (SINGLE_NAME, INDEX_NAME):
        if os.path.lexists(folder / name):
            return name
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(_FORMATS))
    advice = HOW_TO_CONVERT
    if any(name.endswith(".safetensors") for name in found):
        advice = "Name the .safetensors file itself if it is the whole checkpoint, or add the index."
    raise FileNotFoundError(
        f"{folder}: found {', '.join(found[:5]) or 'no weights'}, expected {SINGLE_NAME} or {INDEX_NAME}. {advice}"
    )


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
