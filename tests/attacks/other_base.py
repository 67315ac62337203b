"""The adapter is loaded on another checkpoint of the same shapes: its directions are not that one's."""

from pathlib import Path

from peft import PeftModel
from scene import adapter, answer
from small_models import load, save_llama

import qsvft

REFUSED = "this adapter does not fit the base model: .* the weight is another one"


def attack(place: Path) -> str:
    """What is said of it."""
    folder = adapter(place)
    other = qsvft.quantize(load(save_llama(place / "other", seed=5, num_hidden_layers=2)), 4, progress=False)
    return answer(lambda: PeftModel.from_pretrained(other, folder))
