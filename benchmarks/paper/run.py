"""One run: a method trained with one seed, asked everything, and its line written. What is done is never done twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import ProgressCallback, set_seed
from transformers.trainer_callback import PrinterCallback

import qsvft
from qsvft.storage.only_process import only_process
from qsvft.storage.whole_files import write_whole
from qsvft.training.checkpoints import last_whole
from qsvft.training.progress import shown
from qsvft.training.train import in_one_line, kept_of

from ..gpu.results import commit, machine, versions
from .experiment import OURS, WHOLE, Experiment, Method
from .images import Images
from .language import Language
from .sentences import Sentences
from .ways import is_head, make, trained_again

KINDS: Mapping[str, Any] = {"language": Language, "sentences": Sentences, "images": Images}
SETTINGS, TRAINED, SCORES, CHECKPOINTS, MODEL = "settings.json", "trained.json", "scores.json", "checkpoints", "model"
LOCK = ".lock"

Say = Callable[[str], None]
Row = dict[str, Any]


def arguments_of(experiment: Experiment, method: Method, seed: int) -> dict[str, Any]:
    """The trainer's arguments: the experiment's, over them the method's.

    Raises:
        ValueError: there is no learning rate.
    """
    found = {**experiment.training, **method.training, "seed": seed}
    if "learning_rate" not in found:
        raise ValueError(f"{experiment.name}: methods: {method.name}: training: found no learning_rate; expected one")
    return found


def settings_of(experiment: Experiment, method: Method, seed: int) -> Row:
    """What tells a run from another one of the same name."""
    own = {name: value for name, value in dataclasses.asdict(method).items() if name not in ("paper", "counts")}
    asked = {name: dataclasses.asdict(data) for name, data in experiment.asked.items()}
    return {
        "model": experiment.model,
        "train": dataclasses.asdict(experiment.train),
        "asked": asked,
        "training": dict(experiment.training),
        "method": own,
        "seed": seed,
    }


class OneRun:
    """See the module.

    Args:
        experiment, method, seed: which.
        folder: of the experiment's runs.
        batch_size: of questions asked at once.
        say: takes lines for a person.
    """

    def __init__(
        self, experiment: Experiment, method: Method, seed: int, folder: Path, batch_size: int, say: Say
    ) -> None:
        self.experiment, self.method, self.seed, self.say = experiment, method, seed, say
        self.folder = folder / experiment.name / method.folder / f"seed-{seed}"
        self.kind = KINDS[experiment.kind](experiment, batch_size)

    @property
    def arguments(self) -> Any:
        """The trainer's."""
        given = arguments_of(self.experiment, self.method, self.seed)
        return self.kind.arguments(given, self.folder / CHECKPOINTS)

    @property
    def trained(self) -> Row | None:
        """What is known of its training, once it is done."""
        return _read(self.folder / TRAINED)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """By what was asked, as far as that is done."""
        return _read(self.folder / SCORES) or {}

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.trained is not None and set(self.experiment.asked) <= set(self.scores)

    def check(self) -> None:
        """Refuse a folder where a run with other settings was begun.

        Raises:
            ValueError: naming what differs.
        """
        before, now = _read(self.folder / SETTINGS), _plain(settings_of(self.experiment, self.method, self.seed))
        if before is not None and before != now:
            other = sorted(name for name in now if before.get(name) != now[name])
            raise ValueError(
                f"{self.folder}: found a run with another {' and another '.join(other)} (see {SETTINGS}); expected the "
                "same. Give another --output, or take that folder away."
            )

    def go(self) -> Row:
        """Do what is left.

        Raises:
            ValueError: a run with other settings was begun there, or another process has this one in hand.
            qsvft.TrainingError: it began and came to no end, in one line.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with only_process(self.folder / LOCK, "training", "--output"):
            self.check()
            write_whole(self.folder / SETTINGS, _json(settings_of(self.experiment, self.method, self.seed)))
            self._go()
        return self.row()

    def _go(self) -> None:
        with in_one_line(self._kept):
            model = self._train() if self.trained is None else None
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
            for name in self.experiment.asked:
                if name not in self.scores:
                    model = self._again() if model is None else model
                    self._ask(model, name)

    def _kept(self) -> str:
        if self.trained is None:
            return kept_of(self.folder / CHECKPOINTS)
        return "What is trained and what is answered is kept: the same command goes on from there."

    def row(self) -> Row:
        """What there is to know of a run that is done."""
        return {
            "experiment": self.experiment.name,
            "method": self.method.name,
            "seed": self.seed,
            **(self.trained or {}),
            "asked": {name: len(rows) for name, rows in self.kind.asked.items()},
            "scores": self.scores,
        }

    def _train(self) -> Any:
        began, arguments = time.monotonic(), self.arguments
        set_seed(self.seed)
        model = make(
            self.method, self.experiment.model, self.kind.load, self.kind.task_type,
            lambda: self.kind.batches(arguments, self.method.calibration), bool(arguments.gradient_checkpointing),
        )  # fmt: skip
        numbers = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        trainer = self.kind.trainer(model, arguments, arguments_of(self.experiment, self.method, self.seed))
        for usual in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(usual)
        for callback in (shown(self.say), qsvft.StopAtNaN()):
            trainer.add_callback(callback)
        resumed = last_whole(self.folder / CHECKPOINTS)
        if resumed is not None:
            self.say(f"goes on from {resumed}")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        trainer.save_model(str(self.folder / MODEL))
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        found = {
            "trained": sum(count for name, count in numbers.items() if not is_head(name)),
            "head": sum(count for name, count in numbers.items() if is_head(name)),
            "steps": trainer.state.global_step,
            "last_loss": losses[-1] if losses else None,
            "seconds": round(time.monotonic() - began, 1),
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
            "versions": versions(),
            "commit": commit(),
        }
        write_whole(self.folder / TRAINED, _json(found))
        return trainer.model

    def _again(self) -> Any:
        def load(dtype: str | None) -> Any:
            set_seed(self.seed)  # a fresh head is drawn before what was saved of it is read
            return self.kind.load(dtype, self.folder / MODEL if self.method.way in WHOLE else None)

        model = trained_again(self.method, self.folder / MODEL, load)
        # What qsvft.load gives is there already.
        return model.to("cuda") if torch.cuda.is_available() and self.method.way != OURS else model

    def _ask(self, model: Any, name: str) -> None:
        model.eval()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.config.use_cache = True
        found = self.kind.ask(model, name, self.folder)
        self.say(f"{name}: {', '.join(f'{figure} {value:.2f}' for figure, value in found.items())}")
        write_whole(self.folder / SCORES, _json({**self.scores, name: found}))


def _json(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, indent=1, default=list).encode() + b"\n"


def _plain(table: Mapping[str, Any]) -> Any:
    return json.loads(_json(table))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
