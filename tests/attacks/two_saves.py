"""One layer of the adapter is of another training: the mixture was never trained."""

from pathlib import Path

from safetensors.torch import load_file
from scene import WEIGHTS, adapter, answer, change, loaded

REFUSED = "do not match their common digest: some are of another save"


def attack(place: Path) -> str:
    """What is said of it."""
    folder, other = adapter(place, seed=1), load_file(adapter(place, "other", seed=2) / WEIGHTS)
    change(folder / WEIGHTS, lambda tensors: tensors.update({k: t for k, t in other.items() if ".layers.1." in k}))
    return answer(lambda: loaded(place, folder))
