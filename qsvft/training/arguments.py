"""The arguments of TRL's trainer: those of a recipe, and defaults for one card and an adapter of this package."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers.integrations import get_available_reporting_integrations
from trl import DPOConfig, SFTConfig

from ..options.recipe import Recipe

CONFIGS: dict[str, Any] = {"sft": SFTConfig, "dpo": DPOConfig}
MAX_LENGTH = 1024
_PACKAGES = ("mlflow", "tensorboard", "wandb")


def trainer_config(recipe: Recipe, learning_rate: float, held_out: bool) -> Any:
    """An ``SFTConfig`` or ``DPOConfig``.

    Args:
        recipe: its arguments count more than the defaults.
        learning_rate: where the recipe names none.
        held_out: whether there are rows for a loss on them.

    Raises:
        ValueError: a value of another type than the argument's, or that the trainer refuses.
    """
    kind, cuda = CONFIGS[recipe.run.method], torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "output_dir": recipe.run.output,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "max_length": MAX_LENGTH,
        "logging_steps": 1,
        "save_steps": 0.1,
        "save_total_limit": 2,
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": 0.2 if held_out else None,
        "eval_on_start": held_out,
        "report_to": "none",
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
        **({"packing": False} if recipe.run.method == "sft" else {}),
    }
    given = {name: value for name, value in recipe.arguments.items() if value is not None}
    _check_types(kind, given)
    _check_reports(given.get("report_to"))
    chosen = {**defaults, **given}
    chosen.setdefault("per_device_eval_batch_size", chosen["per_device_train_batch_size"])
    try:
        return kind(**chosen)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{kind.__name__}: {' '.join(str(error).split())}") from error


def _check_types(kind: Any, given: Mapping[str, Any]) -> None:
    """transformers takes any value, and stumbles over it later."""
    hints = get_type_hints(kind)
    for name, value in given.items():
        allowed = _plain(hints.get(name))
        if allowed and not any(_is(value, one) for one in allowed):
            words = " or ".join(sorted(one.__name__ for one in allowed))
            raise ValueError(f"{name}: expected {words}, got {value!r}")


def _plain(hint: Any) -> tuple[type, ...]:
    """The types that a hint allows, if all are numbers, switches or None; else nothing is checked."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    named = tuple(one for one in options if one is not type(None))
    return named if named and all(one in (int, float, bool) for one in named) else ()


def _is(value: object, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _check_reports(report_to: Any) -> None:
    """Refuse a log that is not installed, before anything is loaded."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in _PACKAGES and name not in get_available_reporting_integrations():
            raise ValueError(
                f"report_to: found {name!r}, which is not installed; expected an installed one. pip install {name}, or "
                "leave report_to out."
            )
