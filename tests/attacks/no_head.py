"""The base that is merged into has no head: transformers would make one up at random."""

from pathlib import Path

from scene import adapter, answer, change, checkpoint

import qsvft

REFUSED = "no weights for 'lm_head.weight' of LlamaForCausalLM"


def attack(place: Path) -> str:
    """What is said of it."""
    folder, base = adapter(place), checkpoint(place)
    change(base / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    return answer(lambda: qsvft.export(folder, place / "merged", base=base, progress=False, format="dense"))
