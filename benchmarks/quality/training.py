"""One run: a method trained at one rate with one seed, and what came of it.

AdamW without decay, cosine with a tenth of warm-up, gradients clipped at norm 1, autocast in bf16. A run stops early
where it is hopeless, by the rule of :func:`hopeless`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from methods import Method, Setting, Task
from torch import nn
from transformers import set_seed

CHECKED = (0.5, 0.75)
"""After which parts of its steps a run is compared with the method's others."""
MARGIN = 0.15
CALIBRATED_ON = 4


def hopeless(losses: Sequence[float], steps: int, others: Sequence[Sequence[float]]) -> bool:
    """Whether a run stops: its loss is no number; or after a half or three quarters of the steps its mean loss over the
    last eighth of all steps is more than 15 % above the best of the method's other runs there, which saw the same
    batches. (Earlier, low rates are behind that end well.)"""
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) not in (int(steps * part) for part in CHECKED):
        return False
    window = slice(len(losses) - max(steps // 8, 1), len(losses))
    best = min((mean(other[window]) for other in others if len(other) >= len(losses)), default=math.inf)
    return mean(losses[window]) > (1 + MARGIN) * best


def run(
    task: Task,
    method: Method,
    rate: float,
    seed: int,
    steps: int,
    batch_size: int,
    held: str,
    others: Sequence[Sequence[float]] = (),
) -> dict[str, Any]:
    """Train once.

    Args:
        others: the training losses of the method's runs at other rates with the same seed.

    Returns:
        What the run's line holds: trained parameters, the training losses, ``stopped`` (after how many steps, where
        it was hopeless), and else the scores after training.
    """
    set_seed(seed)
    batches = task.batches(seed, steps, batch_size)
    started = time.monotonic()
    setting = Setting(task, seed, held, batches[:CALIBRATED_ON])
    model = method.make(task.load(held, seed), setting)
    prepared = time.monotonic()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found: dict[str, Any] = {
        "trainable_parameters": sum(p.numel() for _, p in trained),
        "prepare_s": round(prepared - started, 2),
    }
    losses = train(task, model, trained, batches, rate, others)
    found["step_s"] = round((time.monotonic() - prepared) / len(losses), 3)
    found["losses"] = [round(loss, 4) if math.isfinite(loss) else None for loss in losses]
    if len(losses) < steps:
        return {**found, "stopped": len(losses)}
    return {**found, **score(task, model)}


def untrained(task: Task, held: str) -> dict[str, Any]:
    """What the line of the model before training holds."""
    return {"trainable_parameters": 0, "losses": [], **score(task, task.load(held, 0))}


def train(
    task: Task,
    model: nn.Module,
    named: Sequence[tuple[str, nn.Parameter]],
    batches: Sequence[Any],
    rate: float,
    others: Sequence[Sequence[float]] = (),
) -> list[float]:
    """The training loss of each step; fewer than there are batches where the run was hopeless."""
    trained, rates = [p for _, p in named], task.rates(named, rate)
    groups = [
        {"params": [p for p, own in zip(trained, rates, strict=True) if own == one]} for one in dict.fromkeys(rates)
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    most = list(dict.fromkeys(rates))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, most, total_steps=len(batches), pct_start=0.1)
    model.train()
    losses: list[float] = []
    for batch in batches:
        with torch.autocast(trained[0].device.type, torch.bfloat16):
            loss = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss.detach()))
        if len(losses) < len(batches) and hopeless(losses, len(batches), others):
            break
    return losses


def score(task: Task, model: nn.Module) -> dict[str, float | None]:
    """The task's scores; what is no number is None."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        scores = task.evaluate(model)
    return {name: round(value, 5) if math.isfinite(value) else None for name, value in scores.items()}
