"""The shapes of an experiment's model, and one line where a part of the model is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
        shapes = experiment.shapes
        if isinstance(shapes, str):
            return model_config(shapes)
        if isinstance(shapes, Mapping):
            fields = dict(shapes)
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        raise
