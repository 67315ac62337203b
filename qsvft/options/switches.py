"""The switches of a lean training step, which are no part of an adapter: given beside its config, and not saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .choices import BASE_BITS
from .option import INTEGER, SWITCH, declared, one_of, option


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


@dataclass(frozen=True)
class Switches:
    """What :func:`qsvft.prepare` and :func:`qsvft.from_pretrained` take beside the fields of a config."""

    gradient_checkpointing: bool = option(
        True, SWITCH, "Recompute activations in the backward, where the model supports it.", "True or False", _is_bool,
        counted=True,
    )  # fmt: skip
    offload: bool = option(
        False, SWITCH, "Keep each layer's checkpoint in host memory between forward and backward.", "True or False",
        _is_bool, counted=True,
    )  # fmt: skip
    tile_mlp: bool = option(
        False, SWITCH, "Take each MLP in tiles of 2048 tokens: for long sequences.", "True or False", _is_bool,
        counted=True,
    )  # fmt: skip
    chunked_loss: bool = option(
        True, SWITCH, "Never hold the logits of a whole batch in training; models whose loss is another one keep it.",
        "True or False", _is_bool, counted=True,
    )  # fmt: skip
    quantize_embeddings: int = option(
        16, INTEGER, "Hold frozen token embeddings and output head in 16 (as they are), 8 or 4 bits.", "16, 8 or 4",
        one_of(BASE_BITS)[1], counted=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, one in SWITCHES.items():
            one.refuse(getattr(self, name))


SWITCHES = declared(Switches)
"""The same as options."""


def without_switches(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of options that were given: the switches (one that is None was not), and the fields of a config."""
    switches = {name: value for name, value in options.items() if name in SWITCHES and value is not None}
    return switches, {name: value for name, value in options.items() if name not in SWITCHES}
