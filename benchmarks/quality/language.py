"""A language model on a task: its loss on the answers, its score on held-out ones, and what it forgets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from base import Base
from questions import Batch, Example, batches, collate, shuffled
from torch import Tensor, nn
from transformers import set_seed

EVALUATED_AT_ONCE = 32
OWN_TEXTS, OWN_LENGTH, OWN_SEED, OWN_AT_ONCE = 24, 160, 0, 8
_NUMBER = re.compile(r"####\s*(-?[\d,.]+)")


@dataclass(frozen=True)
class LanguageTask:
    """What is trained on and what is held out.

    Attributes:
        name: of the data.
        base: the model before training.
        training, held_out: examples.
        own_texts: (texts, tokens), see :func:`own_texts`.
        other_texts: what people wrote, the prompts of another task; none where there is no other.
        exact_match: generate answers, and compare the number after "####".
    """

    name: str
    base: Base
    training: Sequence[Example]
    held_out: Sequence[Example]
    own_texts: Tensor
    other_texts: Sequence[Example] = ()
    exact_match: bool = False

    kind = "CAUSAL_LM"

    def load(self, held: str, seed: int) -> nn.Module:
        """The model before training; see :meth:`Base.load`."""
        return self.base.load(held, seed)

    def rates(self, trained: Sequence[tuple[str, nn.Parameter]], rate: float) -> list[float]:
        """The learning rate of each parameter."""
        return [rate] * len(trained)

    def batches(self, seed: int, steps: int, size: int) -> list[Batch]:
        """One epoch over as many examples as the steps take: the same for every method."""
        pad = self.base.tokenizer.pad_token_id
        return [collate(rows, pad) for rows in shuffled(self.training, steps, size, seed)]

    def own_batches(self) -> list[Batch]:
        """What the model wrote itself, to be predicted whole."""
        return [{"input_ids": ids, "labels": ids} for ids in self.own_texts.split(OWN_AT_ONCE)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss, in nats, of the answers' tokens."""
        logits, wanted = _at_answers(model, batch)
        return F.cross_entropy(logits.float(), wanted)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``loss`` on held-out answers, ``accuracy`` by the likelihood of each choice, and two losses that grow by what
        is forgotten: ``own_text`` (see below), ``other_text``."""
        model.eval()
        scores = {"loss": self.mean_loss(model, self.held_out), "own_text": self.own_text_loss(model)}
        if self.other_texts:
            scores["other_text"] = self.mean_loss(model, self.other_texts)
        if any(example.choices for example in self.held_out):
            scores["accuracy"] = self.accuracy(model)
        if self.exact_match:
            scores["exact_match"] = self.matches(model)
        return scores

    def mean_loss(self, model: nn.Module, examples: Sequence[Example]) -> float:
        """Loss in nats of the answers' tokens."""
        total, count = 0.0, 0
        for rows in batches(examples, EVALUATED_AT_ONCE):
            logits, wanted = _at_answers(model, collate(rows, self.base.tokenizer.pad_token_id))
            total += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
            count += wanted.numel()
        return total / count

    def accuracy(self, model: nn.Module) -> float:
        """The part of the questions with choices whose right choice is the likeliest of them."""
        asked = [example for example in self.held_out if example.choices]
        rows = [replace(e, answer=choice) for e in asked for choice in e.choices]
        likelihoods: dict[tuple[Any, ...], float] = {}
        for together in batches(rows, EVALUATED_AT_ONCE):
            logits, wanted = _at_answers(model, collate(together, self.base.tokenizer.pad_token_id))
            losses = F.cross_entropy(logits.float(), wanted, reduction="none").split([len(e.answer) for e in together])
            likelihoods |= {(e.prompt, e.answer): -float(loss.sum()) for e, loss in zip(together, losses, strict=True)}
        right = sum(max(e.choices, key=lambda choice: likelihoods[e.prompt, choice]) == e.answer for e in asked)
        return right / len(asked)

    def own_text_loss(self, model: nn.Module) -> float:
        """Loss of the texts that the model wrote before it was trained; what it grows by is what is forgotten."""
        total = 0.0
        for ids in self.own_texts.to(_device(model)).split(EVALUATED_AT_ONCE):
            logits = _head(model)(_hidden(model, ids)[:, :-1])
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
        return total / self.own_texts[:, 1:].numel()

    def matches(self, model: nn.Module) -> float:
        """The part of held-out questions whose number is written right, decoding greedily."""
        tokenizer: Any = self.base.tokenizer
        right = 0
        for rows in batches(self.held_out, 2 * EVALUATED_AT_ONCE):
            longest = max(len(example.prompt) for example in rows)
            pad = tokenizer.pad_token_id
            ids = torch.tensor([[pad] * (longest - len(e.prompt)) + list(e.prompt) for e in rows])
            mask = torch.tensor([[0] * (longest - len(e.prompt)) + [1] * len(e.prompt) for e in rows])
            most = max(len(example.answer) for example in self.held_out) + 16
            device = _device(model)
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=most,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
            )
            texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
            right += sum(_number(text) == _number(e.text) for text, e in zip(texts, rows, strict=True))
        return right / len(self.held_out)


@torch.no_grad()
def own_texts(base: Base, path: Path) -> Tensor:
    """What the model writes before training, sampled once at temperature 0.7 and kept in a file: text it is good at."""
    if not path.exists():
        set_seed(OWN_SEED)
        model: Any = base.load().eval()
        start = torch.full((OWN_TEXTS, 1), base.tokenizer.bos_token_id, device=_device(model))
        options = {
            "min_new_tokens": OWN_LENGTH - 1,
            "max_new_tokens": OWN_LENGTH - 1,
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 0,
        }
        pad = base.tokenizer.pad_token_id
        ids = model.generate(start, attention_mask=torch.ones_like(start), pad_token_id=pad, **options)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        staging.write_text(json.dumps(ids.tolist()) + "\n", encoding="utf-8")
        os.replace(staging, path)
    return torch.tensor(json.loads(path.read_text(encoding="utf-8")))


def _number(text: str) -> str | None:
    found = _NUMBER.search(text)
    return found.group(1).replace(",", "").rstrip(".") if found else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _causal(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model: nn.Module) -> nn.Module:
    head: nn.Module = _causal(model).get_output_embeddings()
    return head


def _hidden(model: nn.Module, ids: Tensor) -> Tensor:
    states: Tensor = _causal(model).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states


def _at_answers(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (tokens, V) where an answer's token is predicted, and those tokens: the head reads no other place."""
    moved = {key: value.to(_device(model)) for key, value in batch.items()}
    wanted = moved["labels"][:, 1:]
    answered = wanted >= 0
    hidden = _hidden(model, moved["input_ids"])[:, :-1]
    return _head(model)(hidden[answered]), wanted[answered]
