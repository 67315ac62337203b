"""The checkpoints of a run: the last one that is whole, whenever the run was killed."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..storage.json_files import read_object
from ..storage.tensor_files import TensorFiles

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
STATE = "trainer_state.json"
"""What a trainer writes last."""


def last_whole(folder: Path) -> Path | None:
    """The checkpoint with the most steps in a run's directory that training can go on from; None if there is none.

    One is whole if its state, written last, can be read, the numbers of the adapter (or of the whole model) have their
    length, and the optimizer's file came to its end.
    """
    numbered = [(int(match[1]), path) for path in folder.glob("*") if (match := _NUMBERED.fullmatch(path.name))]
    return next((path for _, path in sorted(numbered, reverse=True) if _is_whole(path)), None)


def steps_of(checkpoint: Path) -> int:
    """How many steps a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[-1])


def _is_whole(folder: Path) -> bool:
    optimizer = folder / "optimizer.pt"
    try:
        read_object(folder / STATE)
        for name in _weights(folder):
            TensorFiles.from_file(folder / name)
    except (OSError, ValueError):
        return False
    return not optimizer.exists() or zipfile.is_zipfile(optimizer)


def _weights(folder: Path) -> set[str]:
    """The files of an adapter, or those of a model that trained whole, in one or several."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        return set(read_object(index)[0]["weight_map"].values())
    return {SAFE_WEIGHTS_NAME if (folder / SAFE_WEIGHTS_NAME).exists() else SAFETENSORS_WEIGHTS_NAME}
