"""A prepared directory and its index lack the second half of a double quantisation: the weight would be far off."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from scene import answer, checkpoint

import qsvft

LACKS = "q_proj.weight.nested_absmax"
REFUSED = "nested_absmax"


def attack(place: Path) -> str:
    """What is said of it."""
    folder = qsvft.prepare_checkpoint(checkpoint(place), place / "prepared", rank=8, progress=False)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kept = {key: file.get_tensor(key) for key in file.keys() if not key.endswith(LACKS)}  # noqa: SIM118
            save_file(kept, path, file.metadata())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if not key.endswith(LACKS)}
    path.write_text(json.dumps(index))
    return answer(lambda: qsvft.from_pretrained(folder, progress=False))
