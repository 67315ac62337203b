"""What the attacks share: a small model, adapters of it, and how a refusal is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import load, randomize, save_llama

import qsvft

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def checkpoint(place: Path) -> Path:
    """A small Llama's."""
    return save_llama(place / "checkpoint", num_hidden_layers=2)


def adapter(place: Path, name: str = "adapter", seed: int = 1, **options: Any) -> Path:
    """One that was trained on it, in 4 bits."""
    model = qsvft.prepare(load(checkpoint(place)), 4, rank=8, progress=False, **options)
    randomize(model, seed=seed).save_pretrained(place / name)
    return place / name


def loaded(place: Path, folder: Path) -> Any:
    """The adapter on its base."""
    return PeftModel.from_pretrained(qsvft.quantize(load(checkpoint(place)), 4, progress=False), folder)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a safetensors file's tensors in place."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def answer(what: Callable[[], Any]) -> str:
    """The words in which it is refused; AssertionError if it is not."""
    try:
        what()
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError("it was let through")
