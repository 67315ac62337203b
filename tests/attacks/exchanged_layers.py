"""The records of two layers change places: each is whole, and neither is where it belongs."""

from pathlib import Path

from scene import WEIGHTS, adapter, answer, change, loaded

REFUSED = "q_proj: the adapter's contents do not match their digest"


def attack(place: Path) -> str:
    """What is said of it."""
    folder = adapter(place)

    def exchange(tensors):
        for key in [key for key in tensors if ".layers.0.self_attn.q_proj." in key]:
            other = key.replace(".layers.0.", ".layers.1.")
            tensors[key], tensors[other] = tensors[other], tensors[key]

    change(folder / WEIGHTS, exchange)
    return answer(lambda: loaded(place, folder))
