"""Learning of SVFT's forms and patterns on the demo's task: held-out loss after equal steps.

    python benchmarks/training.py [--steps 60] [--seeds 0 1] [--json FILE]

Each variant fine-tunes the shipped base model (NF4) on the demo's letter-shifting task, at each learning
rate of a small sweep; shown is the best rate's mean loss (nats a token, held-out completions) over the seeds and its
range. The task is small: differences within the range mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, set_seed

import qsvft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import finetune

ONE_SIDED = {"sides": "one", "pattern": "banded"}
VARIANTS: dict[str, dict[str, Any]] = {
    "two-sided": {"sides": "both", "pattern": "banded"},
    "one-sided": ONE_SIDED,
    "one-sided, int8": {**ONE_SIDED, "factor_bits": 8},
    "one-sided, NF4": {**ONE_SIDED, "factor_bits": 4},
    "two-sided, residual, int8": {"sides": "both", "pattern": "banded", "residual": True, "factor_bits": 8},
}
RATES = (1e-2, 2e-2, 4e-2)


def train_once(options: dict[str, Any], rate: float, steps: int, seed: int) -> float:
    """Held-out loss of one run; infinite if it diverged."""
    set_seed(seed)
    examples = finetune.shift_examples(steps * 32 + 200, seed)
    held_out, training = examples[:200], examples[200:]
    tokenizer = finetune.load_tokenizer(finetune.BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(finetune.BASE_MODEL, dtype=torch.bfloat16)
    model = qsvft.prepare(model, bits=4, progress=False, **options)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        rows = [finetune.encode(example, tokenizer) for example in training[step * 32 : step * 32 + 32]]
        model(**finetune.collate(rows, tokenizer.pad_token_id), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        rows = [finetune.encode(example, tokenizer) for example in held_out]
        loss = float(model(**finetune.collate(rows, tokenizer.pad_token_id)).loss)
    return loss if loss == loss else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="the learning rates of the sweep")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    jobs = [(name, rate) for name in options.variants for rate in options.rates]
    losses = {}
    for name, rate in track(jobs, description="training", console=Console(stderr=True)):
        losses[name, rate] = [train_once(VARIANTS[name], rate, options.steps, seed) for seed in options.seeds]
    table = Table(title=f"Held-out loss after {options.steps} steps, best of {len(options.rates)} learning rates")
    for column in ("variant", "learning rate", "mean loss", "range"):
        table.add_column(column)
    rows = []
    for name in options.variants:
        rate = min(options.rates, key=lambda r: sum(losses[name, r]))
        found = losses[name, rate]
        rows.append({"variant": name, "learning_rate": rate, "losses": found})
        mean = sum(found) / len(found)
        table.add_row(name, f"{rate:g}", f"{mean:.4f}", f"{min(found):.4f} to {max(found):.4f}")
    Console(width=110).print(table)
    if options.json:
        about = {"torch": torch.__version__, "steps": options.steps, "seeds": options.seeds}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
