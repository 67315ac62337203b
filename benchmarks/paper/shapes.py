"""The shapes of an experiment's model, and one line where a part of the model is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qsvft.memory.presets import model_config

from .experiment import Experiment


@contextmanager
def part_of(model: str, what: str) -> Iterator[None]:
    """What stands in the way of a model's part, in one line that names both; a gate of the hub among it.

    Raises:
        ValueError: in place of what transformers raises.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {model!r}: its {what} cannot be read ({reason}); expected a directory with it, or an id that the "
            "hub gives out to you"
        ) from error


def shape_of(experiment: Experiment) -> PretrainedConfig:
    """The config of an experiment's model: of the model itself where it is at hand, of ``shapes`` elsewhere.

    Raises:
        ValueError: neither is known.
    """
    try:
        with part_of(experiment.model, "config"):
            return AutoConfig.from_pretrained(experiment.model)
    except ValueError:
        if experiment.shapes is None:
            raise
        return config_of_shapes(experiment.shapes)


def config_of_shapes(shapes: str | Mapping[str, Any]) -> PretrainedConfig:
    """The config that a preset's name, or a table with model_type, stands for."""
    return model_config(shapes) if isinstance(shapes, str) else AutoConfig.for_model(**shapes)
