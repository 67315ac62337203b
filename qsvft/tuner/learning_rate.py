"""``suggest_learning_rate``: where to begin, so that no search is needed."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from .config import QSVFTConfig

RATE, RATE_OF_WEIGHT = 2e-2, 4e-2


def suggest_learning_rate(model_or_config: nn.Module | QSVFTConfig, adapter_name: str | None = None) -> float:
    """A learning rate for AdamW without decay, with warm-up and a falling schedule.

    With ``unit="weight"`` a step of AdamW at the rate r changes a weight by at most about r of its size, whatever the
    pattern, the rank and the width, so that one number does for all: 2e-2, and twice that for a dense M between
    singular vectors. Best of sweeps in powers of two on a language model of 135M parameters, see ``docs/quality.md``;
    of no form and task there the best was further away than a factor of 2.3.

    Args:
        model_or_config: what :func:`qsvft.prepare` gave, or a config.
        adapter_name: of a model with several adapters; None for the active one.

    Raises:
        ValueError: a model without an adapter of this package, or several active ones; ``unit="one"``, whose best rates
            depend on everything.
    """
    config = model_or_config if isinstance(model_or_config, QSVFTConfig) else _of_model(model_or_config, adapter_name)
    if config.unit == "one":
        raise ValueError(
            "suggest_learning_rate(): found unit='one', in which the best rate depends on pattern, rank and model; "
            "expected unit='weight'. The paper takes 5e-2 for plain and 1e-3 to 5e-3 for banded."
        )
    return RATE_OF_WEIGHT if config.pattern == "dense" and config.basis == "singular" else RATE


def _of_model(model: nn.Module, adapter_name: str | None) -> QSVFTConfig:
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    names = [adapter_name] if adapter_name is not None else getattr(model, "active_adapters", [])
    found = [config for name in names if isinstance(config := configs.get(name), QSVFTConfig)]
    if len(found) != 1:
        raise ValueError(
            f"suggest_learning_rate(): expected a model with one active adapter of qsvft, or its name; found "
            f"{len(found)} of the name or names {names} in a {type(model).__name__} with {sorted(configs)}. Give it "
            "what qsvft.prepare() returned, or a QSVFTConfig."
        )
    return found[0]
