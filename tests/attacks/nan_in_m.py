"""One number of M is NaN: every answer of the merged model would be."""

from pathlib import Path

import torch
from scene import WEIGHTS, adapter, answer, change, checkpoint

import qsvft

REFUSED = "q_proj: M of adapter 'default' holds 1 NaN or Inf values"


def attack(place: Path) -> str:
    """What is said of it."""
    folder = adapter(place)

    def spoil(tensors):
        key = next(key for key in tensors if key.endswith("q_proj.qsvft_M.weight"))
        tensors[key][3] = torch.nan

    change(folder / WEIGHTS, spoil)
    said = answer(
        lambda: qsvft.export(folder, place / "merged", base=checkpoint(place), progress=False, format="dense")
    )
    assert not list((place / "merged").glob("*.safetensors"))
    return said
