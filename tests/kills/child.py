"""What is killed: ``python child.py WORK FOLDER`` says "ready" once everything is imported, and then works."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from small_models import load, randomize
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import qsvft


def preparing(folder: Path) -> None:
    """Prepare a checkpoint into a directory, or go on with it."""
    ready()
    qsvft.prepare_checkpoint(folder / "source", folder / "prepared", progress=False)


def saving(folder: Path) -> None:
    """Save one adapter after another into one directory, all of M 1, then 2, and so on."""
    model = randomize(qsvft.prepare(load(folder / "source"), bits=16, progress=False, rank=8))
    ready()
    for number in range(1, 10**6):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(number)
        model.save_pretrained(folder / "adapter")


def merging(folder: Path) -> None:
    """Merge one adapter after the other, each into a directory of its own."""
    ready()
    for number in range(10**6):
        adapter = folder / ("first", "second")[number % 2]
        qsvft.export(adapter, folder / "merged" / str(number), base=str(folder / "source"), format="dense")


def training(folder: Path) -> None:
    """Train with a checkpoint at every step, from the last that is whole."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16)
    model = qsvft.prepare(base, bits=16, progress=False, rank=8)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (64, 8))]
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 10**4, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(folder / "run"), per_device_train_batch_size=2, use_cpu=True, **options)
    ready()
    Trainer(model, arguments, train_dataset=rows).train()


def ready() -> None:
    """Tell the parent that what takes seconds is done."""
    print("ready", flush=True)


if __name__ == "__main__":
    {"preparing": preparing, "saving": saving, "merging": merging, "training": training}[sys.argv[1]](Path(sys.argv[2]))
