"""``qsvft.train``: a recipe becomes an adapter, on TRL's trainer; a run that was cut off goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import ProgressCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOTrainer, SFTTrainer

from ..loading import from_pretrained
from ..options.recipe import Recipe, read_recipe
from ..storage.only_process import only_process
from ..storage.whole_files import check_folder_writable
from ..tuner.card import write_card
from ..tuner.config import QSVFTConfig
from ..tuner.sharding import make_shardable
from ..tuner.stop_at_nan import StopAtNaN
from .begun import LOCK, begin, begun, recipe_of
from .checkpoints import last_whole, steps_of
from .forecast import Forecast, in_words
from .losses import draw_losses
from .plan import Plan, plan_of
from .progress import bars_of_datasets, shown
from .tokens import batches

PICTURE = "losses.png"

Say = Callable[[str], None]


class TrainingError(RuntimeError):
    """A run that had begun and came to no end; the message says why, and what is kept.

    Attributes:
        interrupted: by a person, and not by a fault.
    """

    def __init__(self, message: str, interrupted: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted


@dataclass(frozen=True)
class Trained:
    """What a run gave.

    Attributes:
        folder: the adapter, for :func:`qsvft.load`; with the recipe, the losses and the last checkpoints.
        steps, seconds: of the run; the seconds since it began or went on.
        before, after: the loss on the rows held out; None without.
    """

    folder: Path
    steps: int
    seconds: float
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        text = f"trained: {self.folder}, {self.steps} steps in {in_words(self.seconds)}"
        if self.before is not None and self.after is not None:
            text += f"; loss on the rows held out {self.before:.4f} -> {self.after:.4f}"
        return text


def train(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any], *, dry_run: bool = False, say: Say = print
) -> Trained | Forecast:
    """Train an adapter by a recipe.

        qsvft.train({"model": "meta-llama/Llama-3.1-8B", "dataset": "data.jsonl", "output": "runs/first"})

    What will be used is said before anything is loaded, and refused where it does not fit. The base is prepared into
    the cache, U and V come from the first batches, M is trained with TRL's ``SFTTrainer`` or ``DPOTrainer``. A run that
    was cut off goes on from its last whole checkpoint when the same recipe is trained again.

    Args:
        recipe: options by name, or a YAML file of them: those of a run (:mod:`qsvft.options.run`), of
            :class:`qsvft.QSVFTConfig`, the switches, and every argument of TRL's ``SFTConfig`` or ``DPOConfig``.
        dry_run: say what would be done, and write nothing.
        say: takes the texts for a person.

    Returns:
        A :class:`Trained`, or the :class:`Forecast` of a dry run.

    Raises:
        ValueError: an option, the data, or a step that fits no card; ``output`` holds another run, or another process
            trains into it.
        TrainingError: the run began and came to no end, as with a NaN; the last whole checkpoint is kept.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    assert recipe.run.output is not None
    folder, processes = Path(recipe.run.output), PartialState(cpu=not torch.cuda.is_available())
    main, resumed = processes.is_main_process, begun(folder, recipe)
    processes.wait_for_everyone()  # all have looked before one writes
    with bars_of_datasets(), ExitStack() as alone:
        plan = plan_of(recipe)
        if main:
            say(str(plan.forecast))
            if resumed is not None:
                say(f"goes on after step {steps_of(resumed)}, from {resumed}")
        if dry_run:
            return plan.forecast
        if main:
            check_folder_writable(folder)
            alone.enter_context(only_process(folder / LOCK, "training", "output"))
            begin(folder, recipe)
        return _run(plan, folder, resumed, say if main else lambda _: None, main)


def _run(plan: Plan, folder: Path, resumed: Path | None, say: Say, main: bool) -> Trained:
    """Load, train, save and draw."""
    began = time.monotonic()
    with in_one_line(lambda: kept_of(folder)):
        trainer = _trainer(plan, say)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed is not None else None)
        trainer.save_model(str(folder))
        history = trainer.state.log_history
        if main:
            draw_losses(history, folder / PICTURE, f"{plan.base.name}, {plan.recipe.run.dataset}")
            _write_card(folder, plan, history)
            trainer.save_state()  # last: it says that the run came to its end
    held = [log["eval_loss"] for log in history if "eval_loss" in log]
    losses = (held[0], held[-1]) if len(held) > 1 else (None, None)
    done = Trained(folder, trainer.state.global_step, time.monotonic() - began, *losses)
    say(str(done))
    return done


@contextmanager
def in_one_line(kept: Callable[[], str]) -> Iterator[None]:
    """Every fault of a run from here on becomes a :class:`TrainingError`, which ends with what is ``kept``."""
    try:
        yield
    except KeyboardInterrupt:
        raise TrainingError(f"interrupted. {kept()}", interrupted=True) from None
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the card's memory is full ({str(error).splitlines()[0]}); expected room for a step. Give --fit SIZE, a "
            f"smaller --max-length or --per-device-train-batch-size. {kept()}"
        ) from error
    except FloatingPointError as error:
        raise TrainingError(f"{error} {kept()}") from error
    except Exception as error:  # of the data, of the disk, of a package in between
        raise TrainingError(f"{type(error).__name__}: {' '.join(str(error).split())}. {kept()}") from error


def _write_card(folder: Path, plan: Plan, history: Sequence[Mapping[str, Any]]) -> None:
    """The adapter's card, with its data and its losses in place of TRL's."""
    held = [log["eval_loss"] for log in history if "eval_loss" in log]
    lines = [
        "## How it was trained", "",
        f"On {len(plan.rows.train):,} rows ({plan.recipe.run.method}), with this recipe:", "",
        "```yaml", recipe_of(plan.recipe, places=False).rstrip(), "```",
    ]  # fmt: skip
    if len(held) > 1:
        rows = f"{len(plan.rows.held_out or ()):,} rows held out"
        lines += ["", f"Loss on {rows}: {held[0]:.4f} before, {held[-1]:.4f} after (nats a token)."]
    write_card(folder, QSVFTConfig.from_pretrained(str(folder)), lines)


def kept_of(folder: Path) -> str:
    """What there is to go on from in a run's folder, in a sentence."""
    found = last_whole(folder)
    if found is None:
        return "There is no whole checkpoint: the same command begins anew."
    return f"The last whole checkpoint is {found}: the same command goes on from there."


def _trainer(plan: Plan, say: Say) -> Any:
    run, config = plan.recipe.run, plan.config
    kind = DPOTrainer if run.method == "dpo" else SFTTrainer
    model = _model(plan)
    if weights_are_split():
        make_shardable(model)
    config.gradient_checkpointing = plan.forecast.step.checkpointing
    trainer = kind(
        model=model,
        args=config,
        train_dataset=plan.rows.train,
        eval_dataset=plan.rows.held_out,
        processing_class=plan.tokenizer,
    )
    for usual in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(usual)
    trainer.add_callback(shown(say))
    if run.stop_at_nan:
        trainer.add_callback(StopAtNaN())
    return trainer


def weights_are_split() -> bool:
    """Whether ``accelerate launch`` was told to split weights between cards, as FSDP and DeepSpeed do."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def _model(plan: Plan) -> PeftModel:
    run, base = plan.recipe.run, plan.base
    processes = PartialState(cpu=not torch.cuda.is_available())
    place: dict[str, Any] = {"revision": run.revision, "dtype": base.dtype, "cache_dir": run.cache_dir}
    if processes.num_processes > 1:
        place["device_map"] = {"": processes.device}
    if run.adapter is not None:
        return from_pretrained(base.name, adapter=run.adapter, **place, **plan.recipe.switches)
    seen = None
    if base.calibration:
        size, length = plan.calibration_size, plan.config.max_length
        seen = list(batches(plan.rows.train, plan.tokenizer, length, size, base.calibration))
    options = {name: value for name, value in plan.options.items() if value is not None}
    return from_pretrained(base.name, base.bits, calibration=seen, **place, **options)
