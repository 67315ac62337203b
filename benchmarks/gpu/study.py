"""The learning study: a small language model trained by qsvft and by QLoRA on one set, held-out loss a run.

The model lies in folders, large files in pieces (pieces.py): a transformers directory, or a GGUF file. The data are a
folder with train.jsonl and dev.jsonl, lines of {"prompt", "completion"} or {"question", "answer"}. Every run has the
same base, examples and order; the loss is on the answers.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pieces import join
from results import ROOT
from suite import Suite
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import qsvft
from qsvft.lean.checkpointing import enable_checkpointing

sys.path.insert(0, str(ROOT / "examples"))
import finetune

STAGE = "study"
Example = dict[str, list[int]]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        folders: where the model's files and pieces lie.
        data: the folder of train.jsonl and dev.jsonl.
        rates: by variant, all first ones before all second ones, so that what there is compares like with like.
        held_out: how many examples of dev.jsonl.
        longest: tokens; longer examples are left out.
    """

    folders: tuple[Path, ...]
    data: Path
    rates: dict[str, tuple[float, ...]]
    steps: int = 100
    batch_size: int = 8
    held_out: int = 64
    longest: int = 160
    seed: int = 0


RATES = {"qsvft": (4e-2, 2e-2, 8e-2), "qlora r=16": (2e-3, 5e-3, 1e-3)}


def run(suite: Suite, study: Study) -> None:
    """One row a run: the held-out loss before and after."""
    wanted = [
        (name, rate)
        for row in zip(*study.rates.values(), strict=True)
        for name, rate in zip(study.rates, row, strict=True)
        if not suite.rows.done(_case(study, name, rate))
    ]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = load(join(study.folders, Path(scratch) / "model"))
        training = _examples(study.data / "train.jsonl", tokenizer, study.longest)
        random.Random(study.seed).shuffle(training)
        training = training[: study.steps * study.batch_size]
        held_out = _examples(study.data / "dev.jsonl", tokenizer, study.longest)[: study.held_out]
        about = {"steps": study.steps, "batch_size": study.batch_size, "seed": study.seed, "held_out": len(held_out)}
        for name, rate in wanted:

            def measure(name: str = name, rate: float = rate) -> dict[str, Any]:
                adapted = _adapted(copy.deepcopy(model).to(suite.device.kind), name, study.seed)
                pad = tokenizer.pad_token_id
                batches = [finetune.collate(rows, pad) for rows in _rows(training, study.batch_size)]
                return train(adapted, batches, [finetune.collate(r, pad) for r in _rows(held_out, 16)], rate)

            suite.attempt(STAGE, _case(study, name, rate), {"variant": name, "rate": rate, **about}, measure)


def _case(study: Study, name: str, rate: float) -> str:
    return f"{STAGE} | {name} | {rate:g} | {study.steps} steps | seed {study.seed}"


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The model in bf16 on the CPU, and its tokenizer."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": files[0]} if files else {}
    own = {} if (folder / "tokenizer.json").exists() else options
    tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if files:
        try:
            from transformers import GgufConfig  # later versions would keep the file's own quantisation

            options["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:
            pass
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _adapted(model: nn.Module, name: str, seed: int) -> nn.Module:
    """The model on an NF4 base with fresh adapters."""
    set_seed(seed)
    if name == "qsvft":
        return qsvft.prepare(model, bits=4, progress=False)
    base = qsvft.quantize(model, bits=4, progress=False)
    enable_checkpointing(base)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return qsvft.enable_chunked_loss(get_peft_model(base.requires_grad_(False), config))


def train(model: nn.Module, batches: Sequence[Batch], held_out: Sequence[Batch], rate: float) -> dict[str, Any]:
    """AdamW without decay, cosine with warm-up, gradients clipped at 1; the held-out loss before and after."""
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = evaluate(model, held_out)
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches), pct_start=0.1)
    model.train()
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    after = evaluate(model, held_out)
    found = {"trainable_parameters": sum(p.numel() for p in trainable), "loss_before": before, "loss_after": after}
    # NaN is no JSON; a run that diverged says so.
    return {key: value if value == value and abs(value) != float("inf") else None for key, value in found.items()}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean loss in nats over the answers' tokens."""
    model.eval()
    device = next(model.parameters()).device
    total = count = 0.0
    for batch in batches:
        moved = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = float(model(**moved, use_cache=False).loss)
        tokens = int((batch["labels"][:, 1:] != finetune.IGNORED).sum())
        total, count = total + loss * tokens, count + tokens
    return total / count


def _examples(path: Path, tokenizer: Any, longest: int) -> list[Example]:
    """Encoded examples of a file, those that are too long left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, completion = (row["question"] + "\n", row["answer"]) if "question" in row else _pair(row)
        found.append(finetune.encode({"prompt": prompt, "completion": completion}, tokenizer))
    return [example for example in found if len(example["input_ids"]) <= longest]


def _pair(row: dict[str, str]) -> tuple[str, str]:
    return row["prompt"], row["completion"]


def _rows(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]
