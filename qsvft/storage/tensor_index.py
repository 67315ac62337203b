"""The index of a checkpoint in several safetensors files: which file holds which tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def is_plain(name: Any) -> bool:
    """Whether a name is that of a file in the folder itself, however a system reads it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
