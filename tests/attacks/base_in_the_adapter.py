"""The adapter's file has a weight of the base, which would stay when the adapter is disabled."""

from pathlib import Path

import torch
from scene import WEIGHTS, adapter, answer, change, loaded

REFUSED = "lm_head.weight: .* a tensor of the base with other values"


def attack(place: Path) -> str:
    """What is said of it."""
    folder = adapter(place)
    more = {"base_model.model.lm_head.weight": torch.zeros(96, 64, dtype=torch.bfloat16)}
    change(folder / WEIGHTS, lambda tensors: tensors.update(more))
    return answer(lambda: loaded(place, folder))
