"""What the lean options cost in learning: held-out loss of a real encoder on a real task, after equal steps.

    python benchmarks/quality.py --model DIRECTORY --train train.tsv --dev dev.tsv --json FILE [--plot FILE]

DIRECTORY holds a small pretrained encoder with its tokenizer (MiniLM, 6 layers of width 384, say); a line of the data
is a sentence, a tab and its class (SST-2, say). Each variant fine-tunes the encoder in NF4, bf16 outside of it, with a
fresh classification head, at each learning rate of its sweep and with each seed. A seed sets the head, the sentences
and their order, the same for every variant; dropout is off, so that nothing else differs. Shown is each variant at the
rate whose mean loss over the seeds is best.

Every finished run is in FILE at once: called again, the command goes on where it was cut off. It runs all variants at
their first rate, then all at the second, so that a table of what there is (--report-only) compares like with like.
Step times are CPU time; on so small a model most of it is not matrix products, and a large one has other ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging

import qsvft
from qsvft.memory.held import FACTORS, SCALES, held

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
import results

HEAD = "classifier"
HEAD_RATE = 1e-3
MAX_TOKENS = 32
RATES = (4e-3, 8e-3, 2e-3)
NARROW_RATES = (4e-3, 8e-3, 1.6e-2)  # a quarter of the coefficients
LORA_RATES = (1e-3, 2e-3, 4e-3)

Example = tuple[list[int], int]  # token ids, class
Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """A way to fine-tune: what makes it of a dense model, and the learning rates to try."""

    make: Callable[[nn.Module], nn.Module]
    rates: tuple[float, ...]


def ours(rates: tuple[float, ...] = RATES, **options: Any) -> Variant:
    """qsvft on an NF4 base; what tells the variants apart is set here or in them, never the library's default."""
    plain = {"sides": "one", "factor_bits": 16, "share_inputs": False, "basis": "singular", "residual": False}
    options = {"bits": 4, "gradient_checkpointing": False, "progress": False, "off_diagonals": 8, **plain, **options}
    return Variant(partial(qsvft.prepare, **options), rates)


def qlora(model: nn.Module) -> nn.Module:
    """PEFT's LoRA on the same NF4 base."""
    base = qsvft.quantize(model, bits=4, skip_modules=[HEAD], progress=False)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(base, config)


REFERENCE = "two-sided bf16"
VARIANTS = {
    REFERENCE: ours(sides="both"),
    "one-sided bf16": ours(),
    "one-sided int8": ours(factor_bits=8),
    "one-sided NF4": ours(factor_bits=4),
    "one-sided bf16, shared": ours(share_inputs=True),
    "one-sided NF4, shared": ours(factor_bits=4, share_inputs=True),
    "one-sided NF4, shared, embeddings int8": ours(factor_bits=4, share_inputs=True, quantize_embeddings=8),
    "hadamard": ours(basis="hadamard"),
    "two-sided int8": ours(sides="both", factor_bits=8),
    "two-sided NF4": ours(sides="both", factor_bits=4),
    "two-sided bf16, residual base": ours(sides="both", residual=True),
    "two-sided int8, residual base": ours(sides="both", residual=True, factor_bits=8),
    "one-sided NF4, rank 96": ours(NARROW_RATES, factor_bits=4, rank=96),
    "one-sided NF4, rank 96, d = 32": ours(factor_bits=4, rank=96, off_diagonals=32),
    "QLoRA, r = 8 (PEFT)": Variant(qlora, LORA_RATES),
    "hadamard, shared": ours(basis="hadamard", share_inputs=True),
}


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """The sentences of a file as token ids, with their class; a bad line ends the program with its number."""
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text, _, label = line.rpartition("\t")
        if not text or not label.isdecimal():
            sys.exit(f"error: {path}, line {number}: wants a sentence, a tab and the number of its class")
        examples.append((tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids, int(label)))
    return examples


def batches(examples: Sequence[Example], size: int, tokenizer: Any) -> list[Batch]:
    """Batches of sentences of about the same length, shortest first."""
    ordered = sorted(examples, key=lambda example: len(example[0]))
    parts = [zip(*ordered[start : start + size], strict=True) for start in range(0, len(ordered), size)]
    return [(tokenizer.pad({"input_ids": ids}, return_tensors="pt"), torch.tensor(labels)) for ids, labels in parts]


@dataclass(frozen=True)
class Task:
    """The checkpoint, its sentences, and how long to train on them."""

    model: Path
    training: Sequence[Example]
    held_out: Sequence[Example]
    tokenizer: Any
    steps: int
    batch_size: int

    def load(self) -> nn.Module:
        classes = 1 + max(label for _, label in (*self.training, *self.held_out))
        model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=classes, dtype=torch.bfloat16)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    def shuffled(self, seed: int) -> list[Batch]:
        """One epoch over as many sentences as the steps take."""
        chosen = random.Random(seed).sample(self.training, self.steps * self.batch_size)
        found = batches(chosen, self.batch_size, self.tokenizer)
        random.Random(seed).shuffle(found)
        return found


def train_once(task: Task, variant: Variant, rate: float, seed: int) -> dict[str, Any]:
    """One run's figures; the loss is None if it diverged."""
    set_seed(seed)
    dense, started = task.load(), time.process_time()
    model = variant.make(dense)
    prepared = time.process_time()
    train(model, task.shuffled(seed), rate)
    trained = time.process_time()
    loss, accuracy = evaluate(model, batches(task.held_out, 64, task.tokenizer))
    frozen = [item for item in held(model) if not item.tensor.requires_grad]
    return {
        "loss": loss,
        "accuracy": accuracy,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "factor_bytes": sum(item.nbytes for item in frozen if item.kind in (FACTORS, SCALES)),
        "frozen_bytes": sum(item.nbytes for item in frozen),
        "prepare_s": prepared - started,
        "step_s": (trained - prepared) / task.steps,
    }


def train(model: nn.Module, training: Sequence[Batch], rate: float) -> None:
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head, adapter = ([p for name, p in trainable if (f".{HEAD}." in name) is wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": adapter}, {"params": head}], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, HEAD_RATE], total_steps=len(training), pct_start=0.1, anneal_strategy="linear"
    )
    model.train()
    for tokens, labels in training:
        # In fp32: a loss in bf16 has steps of 0.4 %.
        nn.functional.cross_entropy(model(**tokens).logits.float(), labels).backward()
        nn.utils.clip_grad_norm_([*adapter, *head], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Sequence[Batch]) -> tuple[float | None, float]:
    """Mean loss, in nats a sentence (None if not finite), and the part that is classified right."""
    model.eval()
    logits = torch.cat([model(**tokens).logits.float() for tokens, _ in held_out])
    labels = torch.cat([labels for _, labels in held_out])
    loss = float(nn.functional.cross_entropy(logits, labels))
    return (loss if loss < float("inf") else None), float((logits.argmax(1) == labels).float().mean())


def sweep(task: Task, names: Sequence[str], record: dict[str, Any], path: Path) -> None:
    """Do every run that the record lacks, and write the record after each."""
    done = {(run["variant"], run["rate"], run["seed"]) for run in record["runs"]}
    passes = zip(*([(name, rate) for rate in VARIANTS[name].rates] for name in names), strict=True)
    jobs = ((*job, seed) for job in chain.from_iterable(passes) for seed in record["settings"]["seeds"])
    missing = [job for job in jobs if job not in done]
    for name, rate, seed in track(missing, description="training", console=Console(stderr=True)):
        figures = train_once(task, VARIANTS[name], rate, seed)
        record["runs"].append({"variant": name, "rate": rate, "seed": seed, **figures, "commit": results.commit()})
        staging = path.with_name(f".{path.name}.part")
        staging.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(staging, path)


def open_record(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record in a file, or a new one; runs of other settings are not continued."""
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] != settings:
            sys.exit(f"error: {path} holds runs of {record['settings']}, not of {settings}; give another --json")
        return record
    about = {"machine": results.machine("cpu"), "versions": results.versions(), "commit": results.commit()}
    return {"about": about, "settings": settings, "runs": []}


@dataclass(frozen=True)
class Best:
    """A variant at its best rate: its runs, one a seed."""

    name: str
    rate: str  # with a star where it is the lowest or highest of the sweep
    runs: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [loss_of(run) for run in self.runs]

    def mean(self, figure: str) -> float:
        return mean(run[figure] for run in self.runs)


def loss_of(run: dict[str, Any]) -> float:
    return float("inf") if run["loss"] is None else float(run["loss"])


def all_best(record: dict[str, Any]) -> list[Best]:
    """Each variant at the rate with the best mean loss, among those that have all their seeds; the reference first."""
    found, seeds = [], record["settings"]["seeds"]
    for name, variant in VARIANTS.items():
        runs = {(run["rate"], run["seed"]): run for run in record["runs"] if run["variant"] == name}
        whole = [rate for rate in variant.rates if all((rate, seed) in runs for seed in seeds)]
        if whole:
            best = min(whole, key=lambda rate: mean(loss_of(runs[rate, seed]) for seed in seeds))
            edge = "*" if best in (min(whole), max(whole)) else ""
            tried = "" if len(whole) == len(variant.rates) else f" ({len(whole)} of {len(variant.rates)})"
            found.append(Best(name, f"{best:g}{edge}{tried}", [runs[best, seed] for seed in seeds]))
        elif name == REFERENCE:
            sys.exit(f"error: the reference, {REFERENCE}, has no learning rate with all its seeds yet")
    return found


def table_of(record: dict[str, Any], found: Sequence[Best]) -> Table:
    settings, reference = record["settings"], found[0]
    spread = max(reference.losses) - min(reference.losses)
    table = Table(
        title=f"Held-out loss after {settings['steps']} steps of {settings['batch_size']} sentences, "
        f"{len(settings['seeds'])} seeds, each variant at its best learning rate",
        caption="difference: to the reference with the same seed, mean and range; in spreads: the mean in units of the "
        f"reference's range over seeds ({spread:.4f}). A rate with * is the lowest or highest tried. Bytes in MB, "
        "prepare in CPU seconds, step in units of the reference's.",
    )
    table.add_column("variant", no_wrap=True)
    absolute = ("trainable", "factors", "all frozen", "rate", "loss", "range", "accuracy")
    for column in (*absolute, "difference", "its range", "in spreads", "prepare", "step"):
        table.add_column(column, justify="right")
    for best in found:
        d = [a - b for a, b in zip(best.losses, reference.losses, strict=True)]
        size = (f"{best.mean('factor_bytes') / 1e6:.2f}", f"{best.mean('frozen_bytes') / 1e6:.1f}")
        loss = (f"{mean(best.losses):.4f}", f"{min(best.losses):.4f} {max(best.losses):.4f}")
        compared = (f"{mean(d):+.4f}", f"{min(d):+.4f} {max(d):+.4f}", f"{mean(d) / (spread or 1):+.2f}")
        times = (f"{best.mean('prepare_s'):.1f}", f"{best.mean('step_s') / reference.mean('step_s'):.2f}")
        trainable, accuracy = f"{best.mean('trainable_parameters'):,.0f}", f"{best.mean('accuracy'):.1%}"
        table.add_row(best.name, trainable, *size, best.rate, *loss, accuracy, *compared, *times)
    return table


def draw(found: Sequence[Best], path: Path) -> None:
    """One dot a seed and a bar at the mean, a line for each variant; shaded is the reference's range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.32 * len(found)), layout="constrained")
    axes = figure.subplots()
    for row, best in enumerate(found):
        color = "tab:orange" if best.name == REFERENCE else "tab:blue"
        axes.plot(best.losses, [row] * len(best.losses), "o", color=color, alpha=0.55, markersize=5)
        axes.plot(mean(best.losses), row, "|", color=color, markersize=15, markeredgewidth=2)
        if best.name == REFERENCE:
            axes.axvspan(min(best.losses), max(best.losses), color=color, alpha=0.12, linewidth=0)
    axes.set_yticks(range(len(found)), [best.name for best in found])
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss, nats a sentence")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (("model", "directory of the encoder"), ("train", "sentences to train on"), ("dev", "held out")):
        parser.add_argument(f"--{name}", type=Path, help=text)
    parser.add_argument("--json", type=Path, required=True, help="the file of the runs; none in it is repeated")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--report-only", action="store_true", help="train nothing, show what the file holds")
    parser.add_argument("--plot", type=Path, help="draw a picture to this file; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.report_only:
        record = json.loads(options.json.read_text(encoding="utf-8"))
    else:
        if None in (options.model, options.train, options.dev):
            parser.error("training needs --model, --train and --dev")
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT uses the old name
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        record = open_record(options.json, {key: getattr(options, key) for key in ("steps", "batch_size", "seeds")})
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        training, held_out = (read_examples(path, tokenizer) for path in (options.train, options.dev))
        if len(training) < options.steps * options.batch_size:
            sys.exit(f"error: {options.train}: {len(training)} sentences, --steps and --batch-size want more")
        task = Task(options.model, training, held_out, tokenizer, options.steps, options.batch_size)
        sweep(task, options.variants, record, options.json)
    found = all_best(record)
    Console(width=210).print(table_of(record, found))
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
