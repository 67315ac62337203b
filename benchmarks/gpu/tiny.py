"""Stage "tiny": a small model, prepared once, trained, saved, loaded again and merged on the card and on the CPU.

Both load the same directory, so that the weights and factors are the same numbers; everything is in fp32 but the
quantised weights. AdamW would turn a rounding of a small gradient into a whole step, so the steps are plain gradient
descent.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import FAILED
from suite import Suite
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qsvft
from qsvft.memory.presets import model_config

STAGE = "tiny"
STEPS, RATE = 5, 0.5
BOUNDS = {"loss": 1e-4, "M": 1e-3, "logits": 1e-3, "reloaded": 1e-3, "merged": 1e-3}
"""Largest relative differences: card against CPU, and of the adapter's saved and merged model against itself."""


@dataclass
class Trained:
    """What a device made of the model: losses, M, logits; and the logits of the saved and the merged model."""

    loss: Tensor
    M: Tensor
    logits: Tensor
    reloaded: Tensor
    merged: Tensor


def run(suite: Suite) -> None:
    """Compare the device with the CPU for each form."""
    with tempfile.TemporaryDirectory() as folder:
        source = _source(Path(folder))
        for options in suite.plan.forms:
            name = ",".join(f"{key}={value}" for key, value in options.items()) or "default"
            case = f"{STAGE} | {name}"
            if suite.rows.done(case):
                continue

            def measure(options: dict[str, Any] = options, name: str = name) -> dict[str, Any]:
                return compare(source, Path(folder) / name, suite.device.kind, options)

            suite.attempt(STAGE, case, {"bounds": BOUNDS, "steps": STEPS}, measure)


def compare(source: Path, folder: Path, device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Differences of a device's results to the CPU's, with the status "failed" where one is over its bound."""
    prepared = qsvft.prepare_checkpoint(source, folder / "prepared", device="cpu", progress=False, **options)
    card, cpu = (train(prepared, folder / f"on-{where}", where) for where in (device, "cpu"))
    found = {
        "loss": relative(card.loss, cpu.loss),
        "M": relative(card.M, cpu.M),
        "logits": relative(card.logits, cpu.logits),
        "reloaded": relative(card.reloaded, card.logits),
        "merged": relative(card.merged, card.logits),
    }
    result: dict[str, Any] = {
        "differences": found,
        "loss_before": float(cpu.loss[0]),
        "loss_after": float(cpu.loss[-1]),
    }
    over = [key for key, value in found.items() if not value <= BOUNDS[key]]
    if over:
        result |= {"status": FAILED, "reason": ", ".join(f"{key} differs by {found[key]:.1e}" for key in over)}
    return result


def train(prepared: Path, adapter: Path, device: str) -> Trained:
    """Train, save, load again and merge on a device; everything comes back on the CPU."""
    model = qsvft.from_pretrained(prepared, device_map=device, progress=False).train()
    tokens = _tokens(model).to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    M = torch.cat([p.detach().reshape(-1) for p in trainable])
    model.save_pretrained(adapter)
    again = qsvft.from_pretrained(prepared, adapter=adapter, device_map=device, progress=False)
    found = Trained(torch.stack(losses), M, _logits(model), _logits(again), _logits(again.merge_and_unload()))
    return Trained(**{name: value.double().cpu() for name, value in vars(found).items()})


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _source(folder: Path) -> Path:
    """A small checkpoint of random weights, large enough that their outputs differ."""
    config = model_config("tiny")
    config.initializer_range = 0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "source")
    return folder / "source"


def _tokens(model: nn.Module) -> Tensor:
    size: int = model.config.vocab_size
    return torch.randint(size, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    model.eval()
    device = next(model.parameters()).device
    result: Tensor = model(input_ids=_tokens(model).to(device)).logits
    return result
