"""The studies: which methods train on which tasks, how long and with which seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from base import BF16, DENSE, FRAME, NF4, RESIDUAL, RESIDUAL_INT8, Base
from language import LanguageTask, own_texts
from methods import METHODS, Method, Task
from questions import SHIFT, Example, prompts, read_examples, shift_examples
from sentences import SentenceTask, read_sentences
from sweep import best_rate, next_rate, next_run

Row = dict[str, Any]

UNTRAINED = "before training"
LONGEST = 160
OWN_TEXTS = "own-texts.json"
SENTENCES = ("sst2",)
FILES = {"gsm8k": "gsm8k/{part}.jsonl"}
COMMONSENSE = "commonsense/{task}.{part}.jsonl"
PARTS = ("train", "dev")
OTHERS, OTHER = 64, {"gsm8k": "arc-easy"}
"""What is forgotten shows on so many prompts of a task that is not trained on: GSM8K's questions, or ARC's."""


@dataclass(frozen=True)
class Job:
    """A method on a task: one sweep of learning rates and its seeds.

    Attributes:
        seeds: the first is the sweep's.
        held: how the base is held; see base.py.
        held_out: how many examples are held out (of sentences all are).
        swept: how the base is held in the sweep whose best rate this takes; None for a sweep of its own.
        rate: the one learning rate of all its seeds, in place of a sweep.
        exact_match: whether answers are generated too.
    """

    task: str
    method: Method
    steps: int = 40
    batch_size: int = 8
    seeds: tuple[int, ...] = (0,)
    held: str = DENSE
    held_out: int = 64
    swept: str | None = None
    rate: float | None = None
    exact_match: bool = False

    def identity(self, rate: float, seed: int) -> Row:
        """What makes a run of this job the one it is."""
        return {
            "task": self.task,
            "method": self.method.name,
            "options": self.method.options,
            "rate": rate,
            "seed": seed,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "held": self.held,
            "held_out": self.held_out,
        }

    def untrained(self) -> Row:
        """The same of the model before training."""
        none = {"method": UNTRAINED, "options": {}, "steps": 0, "batch_size": 0}
        return {**self.identity(0.0, 0), **none}

    def rows(self, rows: Sequence[Row], seed: int | None = None) -> list[Row]:
        """Those of this job, of one seed or of all."""
        same = self.identity(0.0, 0)
        own = [row for row in rows if all(row[name] == same[name] for name in same if name not in ("rate", "seed"))]
        return [row for row in own if seed in (None, row["seed"]) and self.rate in (None, row["rate"])]

    def losses(self, rows: Sequence[Row]) -> dict[int, dict[float, float]]:
        """Held-out losses by seed and rate, infinite where a run stopped early."""
        found: dict[int, dict[float, float]] = {}
        for row in self.rows(rows):
            loss = row.get("loss")
            found.setdefault(row["seed"], {})[row["rate"]] = math.inf if loss is None else loss
        return found

    def next_run(self, rows: Sequence[Row]) -> tuple[float, int] | None:
        """The rate and the seed that it wants next; None where it has all, or waits for a sweep elsewhere."""
        if self.rate is not None:
            done = self.losses(rows)
            return next(((self.rate, seed) for seed in self.seeds if self.rate not in done.get(seed, {})), None)
        if self.swept is None:
            return next_run(self.method.start, self.seeds, self.losses(rows))
        sweep = replace(self, held=self.swept).losses(rows).get(self.seeds[0], {})
        rate, done = best_rate(sweep), self.losses(rows)
        if rate is None or next_rate(self.method.start, sweep) is not None:
            return None
        return next(((rate, seed) for seed in self.seeds if rate not in done.get(seed, {})), None)


def load_task(job: Job, model: Path, data: Path, runs: Path, device: str) -> Task:
    """The model and the examples of a job; what the model wrote before training lies beside the runs."""
    if job.task in SENTENCES:
        base = Base(model, device, classes=2)
        parts = [read_sentences(data / job.task / f"{part}.tsv", base.tokenizer) for part in ("train", "dev")]
        return SentenceTask(job.task, base, *parts)
    base = Base(model, device)
    others: list[Example] = []
    if job.task == SHIFT:
        held_out, training = shift_examples(base.tokenizer, job.held_out)
    else:
        training, held_out = (read_examples(_file(data, job.task, part), base.tokenizer, LONGEST) for part in PARTS)
        others = prompts(_file(data, OTHER.get(job.task, "gsm8k"), "dev"), base.tokenizer, LONGEST, OTHERS)
    held_out = held_out[: job.held_out]
    own = own_texts(base, runs / OWN_TEXTS)
    return LanguageTask(job.task, base, training, held_out, own, others, job.exact_match)


def _file(data: Path, task: str, part: str) -> Path:
    return data / FILES.get(task, COMMONSENSE).format(task=task, part=part)


def jobs(names: Sequence[str]) -> Iterator[Job]:
    """Those of the studies, in their order."""
    for name in names:
        if name not in STUDIES:
            raise SystemExit(f"error: no study {name!r}; there are {', '.join(STUDIES)}")
        yield from STUDIES[name]


FIRST = (
    "tried: input/output, dense k=96",
    "tried: singular, dense k=96",
    "tried: input/output, dense k=192",
    "full fine-tuning",
    "tried: input/output, dense, as LoRA r=8",
    "LoRA r=16",
    "tried: singular, d=8",
    "tried: input/output, entries by gradient",
    "tried: whole/input k=16",
    "tried: singular, dense k=192",
    "tried: random, dense k=96",
    "LoRA r=8",
)
RIVALS = ("LoRA r=8", "full fine-tuning")
CONTENDERS = (
    "tried: input/output, dense k=96",
    "tried: input/output, dense k=192",
    "LoRA r=16",
    "tried: singular, dense k=96",
    "LoRA r=8",
    "tried: singular, d=8",
    "tried: input/output, dense, as LoRA r=8",
)
LEAN = (
    "data int8, given back, dense k=128",
    "data int8, given back, dense k=64",
    "singular int8, dense k=128",
    "two-sided d=8 (the paper's)",
    "two-sided int8 d=8",
    "two-sided NF4 d=8",
    "one-sided d=8",
    "one-sided int8 d=8",
    "one-sided NF4 d=8",
    "one-sided NF4, rank 96, d=8",
    "one-sided NF4, rank 96, d=32",
    "LoRA r=8",
)
FRONTIER = (
    "data, dense k=96",
    "LoRA r=8",
    "singular, dense k=96",
    "one-sided d=8",
    "LoRA r=16",
    "data, dense k=128",
    "data, dense k=130",
    "two-sided d=8 (the paper's)",
    "full fine-tuning",
    "tried: random, dense k=96",
)
PAPERS = "two-sided d=8 (the paper's)"
FACTORS = (
    "data int8, given back, dense k=128",
    "data int8, given back, dense k=64",
    PAPERS,
    "data int8, given back, dense k=96",
    "data NF4, given back, dense k=128",
    "data bf16, given back, dense k=128",
    "two-sided, plain",
    "two-sided d=2",
    "two-sided random, as many as d=8",
    "two-sided top_k, as many as d=8",
    "tried: singular, entries by gradient",
    "one-sided d=8",
    "one-sided, plain",
    "DoRA r=8",
    "data int8, given back, dense k=32",
    "data int8, given back, dense k=192",
    "authors' SVFT d=8",
    "authors' SVFT d=8, gate",
    "two-sided d=32",
    "LoRA r=2",
    "rsLoRA r=8",
    "PSOFT r=96, free",
    "LoRA-XS (TinyLoRA) r=96",
    "LoRA r=16, EVA's",
    "LoRA r=8, EVA's",
    "VeRA r=256",
    "BOFT b=4",
    "FRoD",
    "LoRA r=8",
    "LoRA r=16",
    "singular, dense k=128",
)
"""One factor at a time, the most telling first."""
TIMED = (
    *(f"data int8, given back, dense k={k}" for k in (32, 64, 96, 128, 192)),
    "data NF4, given back, dense k=128",
    "data bf16, given back, dense k=128",
    PAPERS,
    "two-sided, plain",
    "two-sided d=32",
    "one-sided d=8",
    "one-sided, plain",
    "authors' SVFT d=8",
    "LoRA r=2",
    "LoRA r=8",
    "rsLoRA r=8",
    "DoRA r=8",
    "PSOFT r=96, free",
    "VeRA r=256",
    "BOFT b=4",
    "FRoD",
)
"""Those of which ``costs.py`` is asked what a step costs: one of each that differ in that."""
TOY = (
    "data int8, given back, dense k=64",
    "singular, dense k=64",
    "one-sided d=8",
    PAPERS,
    "LoRA r=8",
    "full fine-tuning",
)
"""What asks for a rate of its own, on a narrow model."""
ON_CHOICES = ("data, dense k=96", "LoRA r=8", "singular, dense k=96", "one-sided d=8", "LoRA r=16")
CHOICES = ("arc-easy", "openbookqa", "boolq", "arc-challenge")
DEFAULT = "data int8, given back, dense k=128"
LONG = {"steps": 100, "seeds": (0, 1, 2), "held_out": 512}
STUDIES: dict[str, list[Job]] = {
    "lean-options": [Job("sst2", METHODS[name], 80, 16, (0, 1, 2)) for name in LEAN],
    "contenders": [Job("gsm8k", METHODS[name], batch_size=4, seeds=(0, 1, 2)) for name in CONTENDERS],
    "toy": [Job(SHIFT, METHODS[name], 60, 32, held_out=200) for name in TOY],
    "first": [Job("gsm8k", METHODS[name], batch_size=4) for name in FIRST],
    "bases": [
        Job("gsm8k", METHODS["LoRA r=8"], batch_size=4, seeds=(0, 1, 2), held=held, swept=DENSE)
        for held in (FRAME, RESIDUAL, BF16)
    ],
    "paper": [
        Job("gsm8k", METHODS[name], batch_size=4)
        for name in (
            PAPERS,
            "one-sided d=8",
            "tried: singular, plain",
        )
    ],
    "data": [Job("gsm8k", METHODS[name], **LONG) for name in ("data, dense k=96", "data, dense k=128")],
    "default": [
        Job("gsm8k", METHODS[DEFAULT], **LONG),
        *(Job(task, METHODS[name], **LONG) for task in ("arc-easy", "openbookqa") for name in (DEFAULT, "LoRA r=16")),
        Job("gsm8k", METHODS["data int8, given back, dense k=56"], **LONG),
    ],
    "uncalibrated": [
        Job("gsm8k", METHODS["singular int8, dense k=128"], batch_size=4, seeds=(0, 1, 2), held=RESIDUAL_INT8),
        Job("gsm8k", METHODS["data int8, from own texts, given back, dense k=128"], batch_size=4),
        Job("gsm8k", METHODS["data int8, given back, dense k=128"], batch_size=4, seeds=(0, 1, 2)),
        Job("gsm8k", METHODS["singular, dense k=128"], batch_size=4, seeds=(0, 1, 2)),
    ],
    "factors": [
        Job("gsm8k", METHODS[name], batch_size=4, seeds=(0, 1, 2) if name == PAPERS else (0,)) for name in FACTORS
    ],
    "half-percent": [
        Job(task, METHODS["data int8, given back, dense k=56"], **LONG) for task in ("openbookqa", "arc-easy")
    ],
    "no-search": [
        Job(task, METHODS[DEFAULT], rate=2.26e-2, **LONG)
        for task in ("gsm8k", "arc-easy", "openbookqa", "arc-challenge")
    ],
    "repeated": [
        Job("gsm8k", METHODS[name], batch_size=4, seeds=(0, 1, 2))
        for name in ("data int8, given back, dense k=192", "data int8, given back, dense k=64", "LoRA r=2")
    ],
    "timed": [Job("gsm8k", METHODS[name], batch_size=4) for name in TIMED],
    "choices": [
        Job(task, METHODS[name], **LONG)
        for name in ("full fine-tuning", "LoRA r=8")
        for task in ("arc-easy", "openbookqa")
    ],
    "third": [Job("arc-challenge", METHODS[name], **LONG) for name in (DEFAULT, "LoRA r=16", "full fine-tuning")],
    "ideas": [
        Job("gsm8k", METHODS[f"tried: {name}, dense k=96"], batch_size=4)
        for name in ("from the error", "one-sided input")
    ],
    "corrected": [
        Job("gsm8k", METHODS["tried: corrected, dense k=96"], batch_size=4),
        Job("gsm8k", METHODS["singular, dense k=96"], batch_size=4, held=RESIDUAL, seeds=(0, 1, 2)),
        Job("gsm8k", METHODS["LoRA r=16, LoftQ's"], batch_size=4),
        Job("gsm8k", METHODS["data, dense k=96"], batch_size=4, held=RESIDUAL),
    ],
    "card": [
        *(Job("gsm8k", METHODS[name], **LONG) for name in FRONTIER),
        *(Job(task, METHODS[name], **LONG) for task in CHOICES for name in ON_CHOICES),
        *(Job("gsm8k", METHODS[name], **LONG) for name in FACTORS),
    ],
    "four-bit": [
        Job("gsm8k", METHODS[name], batch_size=4, held=NF4, swept=DENSE, exact_match=True)
        for name in (DEFAULT, "LoRA r=8", PAPERS, "LoRA r=16")
    ],
    "card-four-bit": [
        Job("gsm8k", METHODS[name], held=NF4, swept=DENSE, exact_match=True, **LONG) for name in FRONTIER[:7]
    ],
    "whitened": [Job("gsm8k", method, batch_size=4) for name, method in METHODS.items() if "whitened" in name],
    "rivals": [Job("gsm8k", METHODS[name]) for name in RIVALS],
}
