"""The settings that may fit a card, from the most faithful and fastest down to the leanest.

The ladder starts at the default rank and factors, and no checkpointing. Each rung keeps what the one above it has
and gives up one thing more, the cheapest first: time before exactness, exactness where no cost shows in
training, and last the rank, since truncation is the one step that does cost there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ...lean.by_tiles import TOKENS
from ...lean.offload import offload_checkpoints, stop_offloading
from ...lean.tiles import tile_mlps, whole_mlps
from ...lean.vocabulary import quantize_embeddings
from ...options.adapter import OPTIONS
from ...options.switches import SWITCHES
from ...storage.shapes_only import shapes_only
from ...tuner.config import QSVFTConfig
from ...tuner.targets import check_targets, rank_of, shape_of
from ..methods import COUNTED, WRITTEN, Method

RANKS = (2048, 1024, 512, 256, 128, 64, 32, 16)
RANK_COST = "fewer directions; of a full-rank band a quarter of them cost 0.01 nats (MiniLM)"
RANK_COSTS = {
    64: "fewer directions; 64 in place of 128 of a dense M cost 0.015 nats (SmolLM2-135M)",
    32: "fewer directions; 32 in place of 128 of a dense M cost 0.045 nats (SmolLM2-135M)",
    16: "fewer directions; already 32 in place of 128 of a dense M cost 0.045 nats (SmolLM2-135M)",
}


@dataclass(frozen=True)
class Step:
    """One step down: the option that changes, and what that costs, in one line."""

    option: str
    value: Any
    cost: str

    def __str__(self) -> str:
        return f"{self.option}={self.value!r}: {self.cost}"


# What rounding the vocabulary does to the logits is measured by benchmarks/vocabulary.py, what rounding the
# factors and truncation do to training by benchmarks/quality: see docs/quality.md.
STEPS = (
    Step("gradient_checkpointing", True, "the same gradients; the forward runs a second time in the backward"),
    Step("tile_mlp", True, "an MLP takes 2048 tokens after the other; its sums over tokens are rounded elsewhere"),
    Step("factor_bits", 8, "int8 factors; the loss after training moves by less than 0.001 (MiniLM)"),
    Step("factor_bits", 4, "NF4 factors, a tenth off the exact ones; the loss moves by 0.003 (MiniLM, SmolLM2-135M)"),
    Step("quantize_embeddings", 8, "embeddings and head in int8; on a small model that moves the logits by 0.6%"),
    Step("offload", True, "checkpoints wait in host memory: the same gradients, for the time of the copies"),
    Step("quantize_embeddings", 4, "embeddings and head in NF4; on a small model that moves the logits by 5.5%"),
    *(Step("rank", rank, RANK_COSTS.get(rank, RANK_COST)) for rank in RANKS),
)


DEFAULTS = {
    name: one.default for name, one in COUNTED.items() if name in SWITCHES or any(step.option == name for step in STEPS)
}
"""What ``prepare`` does where it is told nothing, of all that the ladder changes or a step depends on."""

FIXABLE = tuple(dict.fromkeys((*DEFAULTS, *COUNTED)))
"""The options that can be fixed: all that the ledger counts."""


@dataclass(frozen=True)
class Rung:
    """Settings, complete, as keywords of ``prepare``.

    Attributes:
        settings: the value of every option that the ladder knows, and of every fixed one.
        fixed: the options that the user fixed.
        steps: what was given up to get here, one step for an option.
    """

    settings: Mapping[str, Any]
    fixed: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward."""
        return bool(self.settings["gradient_checkpointing"])

    @property
    def calibrated(self) -> Rung | None:
        """The same with directions from data and what NF4 took given back; None where it is so, or can not be."""
        config = _config(self.settings)
        if (config.pattern, config.sides, config.basis) != ("dense", "both", "singular") or config.residual:
            return None
        return replace(self, settings={**self.settings, "basis": "data", "residual": True})

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of ``prepare`` that say something: what was fixed, and what differs from its defaults."""
        differs = {key for key, value in self.settings.items() if key not in DEFAULTS or value != DEFAULTS[key]}
        return {key: value for key, value in self.settings.items() if key in differs or key in self.fixed}

    @property
    def method(self) -> Method:
        """The same as a method of the profiler; checkpointing is not in it."""
        return Method(self._text(), "qsvft", dict(self.settings))

    def _text(self) -> str:
        parts = []
        for key in WRITTEN:
            value = self.settings.get(key)
            if value is None or DEFAULTS.get(key) == value:
                continue
            parts.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
        return ":".join(filter(None, ("qsvft", ",".join(parts))))

    def __str__(self) -> str:
        now, config = self.settings, _config(self.settings)
        held = {16: "bf16", 8: "int8", 4: "NF4"}
        rank = "full rank" if config.rank is None else f"rank {config.rank}"
        parts = [f"{rank} with {held[config.stored_bits]} factors"]
        parts += [f"{held[now['quantize_embeddings']]} embeddings"] if now["quantize_embeddings"] != 16 else []
        parts += ["MLPs in tiles"] if now["tile_mlp"] else []
        parts += ["offloaded checkpoints"] if now["offload"] else []
        parts += [] if now["gradient_checkpointing"] else ["no checkpointing"]
        return ", ".join(parts)


def ladder(model: PreTrainedModel, fixed: Mapping[str, Any], tokens: int = 0) -> list[Rung]:
    """The rungs that a model can stand on, each leaner than the one before.

    Left out are steps that contradict a fixed option, that the model has no use for, and that it cannot
    take, such as a rank over the limit of a layer.

    Args:
        model: the model on the meta device, not quantised.
        fixed: options by the names that ``prepare`` knows.
        tokens: of a step; where they are no more than a tile, an MLP is not taken in tiles.

    Raises:
        ValueError: an option that is unknown, out of its range, or not for this model.
    """
    _check_fixed(fixed)
    # Fastest first. Whoever asks for checkpoints in host memory means to have checkpoints.
    start = {**DEFAULTS, "gradient_checkpointing": bool(fixed.get("offload", False)), **fixed}
    with shapes_only():
        for option in ("rank", "quantize_embeddings", "offload", "tile_mlp"):
            _check(model, option, start)
        steps = [step for step in STEPS if step.option != "tile_mlp" or tokens > TOKENS]
        return list(_descend(model, Rung(start, tuple(fixed)), steps))


def _descend(model: PreTrainedModel, rung: Rung, steps: Sequence[Step]) -> Iterator[Rung]:
    yield rung
    for step in steps:
        if step.option in rung.fixed or not _leaner(model, step, rung.settings):
            continue
        settings = {**rung.settings, step.option: step.value}
        if _takes(model, step, settings):
            kept = tuple(before for before in rung.steps if before.option != step.option)
            rung = replace(rung, settings=settings, steps=(*kept, step))
            yield rung


def _leaner(model: PreTrainedModel, step: Step, settings: Mapping[str, Any]) -> bool:
    """Whether a step says less than the settings do, which may begin below it."""
    if step.option == "factor_bits":
        return bool(step.value < _config(settings).stored_bits)
    return step.option != "rank" or step.value < _largest_rank(model, settings)


def _takes(model: PreTrainedModel, step: Step, settings: Mapping[str, Any]) -> bool:
    """Whether a model can take a step, and the step can save anything."""
    if step.option == "gradient_checkpointing":
        return bool(model.supports_gradient_checkpointing)
    if step.option in ("offload", "tile_mlp") and not settings["gradient_checkpointing"]:
        return False  # all that autograd keeps would travel, and each MLP be computed again
    try:
        _check(model, step.option, settings)
    except ValueError:
        return False
    return True


def _largest_rank(model: PreTrainedModel, settings: Mapping[str, Any]) -> int:
    """The largest k of all layers."""
    config = _config(settings)
    return max(
        rank_of(config, name, shape_of(model.get_submodule(name), name)) for name in check_targets(model, config)
    )


def _check(model: PreTrainedModel, option: str, settings: Mapping[str, Any]) -> None:
    """Try an option on the shapes of a model."""
    if option == "quantize_embeddings":
        quantize_embeddings(copy.deepcopy(model), settings[option])
    elif option == "offload":
        if settings[option]:
            offload_checkpoints(model)
            stop_offloading(model)
    elif option == "tile_mlp":
        if settings[option]:
            whole_mlps(tile_mlps(model))
    else:
        try:
            check_targets(model, _config(settings))
        except TypeError as error:  # a target that is no linear layer
            raise ValueError(str(error)) from error


def _config(settings: Mapping[str, Any]) -> QSVFTConfig:
    return QSVFTConfig(task_type="CAUSAL_LM", **{key: settings[key] for key in OPTIONS if key in settings})


def _check_fixed(fixed: Mapping[str, Any]) -> None:
    unknown = next((name for name in fixed if name not in FIXABLE), None)
    if unknown is not None:
        raise ValueError(f"option {unknown!r} is unknown, or not counted; expected one of {', '.join(FIXABLE)}")
    for name in SWITCHES.keys() & fixed.keys():
        SWITCHES[name].refuse(fixed[name])
