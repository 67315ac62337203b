"""An encoder with a new head on sentences of two classes (SST-2, say): loss and accuracy on held-out ones."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from base import HEAD, Base
from torch import Tensor, nn

MAX_TOKENS = 32
HEAD_RATE = 1e-3
EVALUATED_AT_ONCE = 64

Sentence = tuple[list[int], int]
Batch = dict[str, Tensor]


def read_sentences(path: Path, tokenizer: Any) -> list[Sentence]:
    """The sentences of a file as token ids, with their class; a bad line ends the program with its number."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text, _, label = line.rpartition("\t")
        if not text or not label.isdecimal():
            sys.exit(f"error: {path}, line {number}: wants a sentence, a tab and the number of its class")
        found.append((tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids, int(label)))
    return found


@dataclass(frozen=True)
class SentenceTask:
    """What is trained on and what is held out; see :class:`language.LanguageTask`."""

    name: str
    base: Base
    training: Sequence[Sentence]
    held_out: Sequence[Sentence]

    kind = "SEQ_CLS"

    def load(self, held: str, seed: int) -> nn.Module:
        """The model before training, with the head of a seed."""
        return self.base.load(held, seed)

    def batches(self, seed: int, steps: int, size: int) -> list[Batch]:
        """One epoch over as many sentences as the steps take, in batches of about the same length."""
        chosen = random.Random(seed).sample(self.training, steps * size)
        found = self._batches(chosen, size)
        random.Random(seed).shuffle(found)
        return found

    def _batches(self, sentences: Sequence[Sentence], size: int) -> list[Batch]:
        ordered = sorted(sentences, key=lambda sentence: len(sentence[0]))
        parts = [zip(*ordered[start : start + size], strict=True) for start in range(0, len(ordered), size)]
        pad = self.base.tokenizer.pad
        return [{**pad({"input_ids": ids}, return_tensors="pt"), "labels": torch.tensor(right)} for ids, right in parts]

    def rates(self, trained: Sequence[tuple[str, nn.Parameter]], rate: float) -> list[float]:
        """The learning rate of each parameter: the head has its own."""
        return [HEAD_RATE if f"{HEAD}." in name else rate for name, _ in trained]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of the batch, in nats."""
        return F.cross_entropy(_logits(model, batch), batch["labels"].to(_device(model)))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``loss`` and ``accuracy`` on held-out sentences."""
        model.eval()
        batches = self._batches(self.held_out, EVALUATED_AT_ONCE)
        logits = torch.cat([_logits(model, batch) for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches]).to(logits.device)
        right = (logits.argmax(1) == labels).float().mean()
        return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(right)}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    read = {name: value.to(_device(model)) for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**read).logits
    return logits.float()
