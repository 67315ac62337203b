"""An index names weights in another folder."""

import json
import shutil
from pathlib import Path

from scene import answer, checkpoint

import qsvft

REFUSED = "index.json: .*expected the plain name of a .safetensors file"


def attack(place: Path) -> str:
    """What is said of it."""
    folder, other = checkpoint(place), place / "other"
    other.mkdir()
    shutil.copy(folder / "config.json", other)
    index = {"weight_map": {"lm_head.weight": "../checkpoint/model.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    return answer(lambda: qsvft.from_pretrained(other, progress=False))
