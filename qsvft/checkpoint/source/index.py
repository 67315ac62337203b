"""Which file a checkpoint's weights are in, or are listed in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...storage.tensor_index import INDEX_NAME, SINGLE_NAME, is_plain

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
