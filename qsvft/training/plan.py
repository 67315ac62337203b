"""A recipe turned into what a trainer needs, and what it will take; nothing is loaded or written yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from ..options.recipe import Recipe
from ..tuner.config import QSVFTConfig
from ..tuner.learning_rate import suggest_learning_rate
from .arguments import MAX_LENGTH, trainer_config
from .base import Base, base_of
from .data import Rows, is_turns, load_rows, turn_by_turn
from .forecast import Forecast, forecast, linear_weights, seconds_of, steps_of_run
from .tokens import encoded

_LOOKED_AT = 1000
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MOST_IN_A_BATCH = 8


@dataclass(frozen=True)
class Plan:
    """What a run is made of.

    Attributes:
        recipe: as it was read.
        base: which, and how it is held.
        tokenizer, rows: of the base, and of the data set.
        config: of TRL's trainer.
        options: of a new adapter and the step, for :func:`qsvft.from_pretrained`.
        forecast: what it will take.
        calibration_size: rows in a batch of the calibration: at most as many tokens as a step goes through at once.
    """

    recipe: Recipe
    base: Base
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    config: Any
    options: Mapping[str, Any]
    forecast: Forecast
    calibration_size: int


def plan_of(recipe: Recipe) -> Plan:
    """Look at the model's config, its tokenizer and the data; count a step.

    Raises:
        ValueError: what the data, the tokenizer, an option or a card's memory stands in the way of.
    """
    run, base = recipe.run, base_of(recipe)
    tokenizer = base_tokenizer(base.name, run.revision)
    rows = load_rows(run, recipe.arguments.get("seed", 42))
    lengths = _lengths(rows, tokenizer, recipe.arguments.get("max_length", MAX_LENGTH))
    rows, arguments = with_answers(rows, tokenizer, recipe.arguments)
    rate = suggest_learning_rate(QSVFTConfig(task_type="CAUSAL_LM", **base.held))
    config = trainer_config(replace(recipe, arguments=arguments), rate, rows.held_out is not None)
    packed = config.max_length if getattr(config, "packing", False) else None
    longest, answers = packed or max(lengths), 2 if run.method == "dpo" else 1
    step = forecast(base, {**base.held, **recipe.switches}, config, longest, answers, run.fit)
    weights = linear_weights(step.config)
    tokens = sum(lengths) / len(lengths)
    steps = steps_of_run(len(rows.train), int(tokens * len(rows.train)), config, packed)
    # Of preferences both answers, with the adapter and without it.
    a_step = int(tokens * config.per_device_train_batch_size * config.gradient_accumulation_steps * answers**2)
    said = Forecast(
        step, weights, lengths, len(rows.train), len(rows.held_out or ()), steps, config,
        steps * seconds_of(weights, a_step, step.checkpointing), answers > 1,
    )  # fmt: skip
    size = config.per_device_train_batch_size * max(1, (config.max_length or longest) // longest)
    size = max(config.per_device_train_batch_size, min(_MOST_IN_A_BATCH, size))
    return Plan(recipe, base, tokenizer, rows, config, {**step.chosen, **base.given, **recipe.switches}, said, size)


def base_tokenizer(base: str, revision: str | None = None, otherwise: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, with a token for padding.

    Args:
        base: a directory or a hub id; of an adapter, where it may have been saved.
        revision: of the hub.
        otherwise: where it is looked for then.

    Raises:
        ValueError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
    except Exception as error:  # whatever a tokenizer's own files make of it
        if otherwise is not None:
            return base_tokenizer(otherwise)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {base!r}: no tokenizer was found ({reason}); expected one beside the weights"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_answers(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
) -> tuple[Rows, dict[str, Any]]:
    """Conversations such that the loss is on what the assistant says: by the template's own marks, or turn by turn."""
    chosen = dict(arguments)
    if is_turns(rows.train) and tokenizer.chat_template is None and "chat_template_path" not in chosen:
        raise ValueError(
            "dataset: found conversations, and the model's tokenizer has no chat template; expected one. Give "
            "chat_template_path (a model or a .jinja file), or the columns prompt and completion by templates."
        )
    if rows.columns != ("messages",) or "assistant_only_loss" in chosen:
        return rows, chosen
    if _marks_answers(tokenizer):
        chosen["assistant_only_loss"] = True
    else:
        rows = Rows(turn_by_turn(rows.train), None if rows.held_out is None else turn_by_turn(rows.held_out))
    return rows, chosen


def _marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says which tokens are the assistant's, or TRL knows one of this family that does."""
    try:
        template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:  # of no family that it knows
        template = tokenizer.chat_template
    return _MARK.search(template) is not None


def _lengths(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[int]:
    if is_turns(rows.train) and tokenizer.chat_template is None:
        return [max_length or MAX_LENGTH]
    few = rows.train.select(range(min(_LOOKED_AT, len(rows.train))))
    return [len(encoded(row, tokenizer, max_length)[0]) for row in few]
