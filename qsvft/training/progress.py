"""What a person sees of a training: a bar where there is a terminal, and a line for each log, in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WORDS = {
    "loss": "loss {:.4f}",
    "eval_loss": "held out {:.4f}",
    "rewards/accuracies": "preferred {:.1%}",
    "eval_rewards/accuracies": "preferred, held out {:.1%}",
    "grad_norm": "gradient {:.2g}",
    "learning_rate": "rate {:.1e}",
}
"""What is shown of a log, and how; all of it is in trainer_state.json."""


def readable(state: TrainerState, logs: Mapping[str, Any]) -> str:
    """A log in words; empty where it has nothing that a person waits for."""
    found = [text.format(float(logs[name])) for name, text in WORDS.items() if name in logs]
    return f"step {state.global_step} of {state.max_steps}: {', '.join(found)}" if found else ""


class ReadableLines(TrainerCallback):
    """A line for each log.

    Args:
        say: takes it.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line."""
        line = readable(state, logs or {})
        if state.is_world_process_zero and line:
            self.say(line)


class ReadableBar(ReadableLines, ProgressCallback):
    """transformers' progress bar, with the lines above it."""

    def __init__(self) -> None:
        super().__init__(lambda line: self.training_bar.write(line) if self.training_bar is not None else None)


def shown(say: Callable[[str], None]) -> TrainerCallback:
    """What fits the place that the output goes to."""
    return ReadableBar() if sys.stderr.isatty() else ReadableLines(say)


@contextmanager
def bars_of_datasets() -> Iterator[None]:
    """datasets' progress bars only where there is a terminal: a file would hold a line for each of their steps."""
    hidden = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
