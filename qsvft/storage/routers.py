"""Linear layers that choose rather than compute: routers of mixtures, and gates with one output.

They are small, and a rounding of theirs sends a token to another expert, so that by default they are neither quantised
nor adapted. Most of transformers' routers are no linear layers; Switch's are.
"""

from __future__ import annotations

from torch import nn

_WORDS = ("router", "gate", "gating")


def routers(model: nn.Module) -> set[str]:
    """The names of a model's linear layers with one output, and of those called a router or gate that have as many
    outputs as the config has experts."""
    numbers = _numbers_of_experts(model)
    found = set()
    for name, layer in model.named_modules():
        outputs = getattr(layer, "nf", getattr(layer, "out_features", None))
        called = any(part in _WORDS or "router" in part for part in name.split("."))
        if name and (outputs == 1 or (called and outputs in numbers)):
            found.add(name)
    return found


def _numbers_of_experts(model: nn.Module) -> set[int]:
    configs = {id(one): one for module in model.modules() if (one := getattr(module, "config", None)) is not None}
    return {
        value
        for config in configs.values()
        for name, value in vars(config).items()
        if name.endswith("experts") and type(value) is int
    }
