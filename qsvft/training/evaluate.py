"""``qsvft.evaluate``: the loss of a model on rows that it was not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from .data import turn_by_turn
from .tokens import IGNORED, batches


@dataclass(frozen=True)
class Evaluated:
    """The loss in nats a token, over how many tokens of how many rows; tokens that are given do not count."""

    loss: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}, on {self.tokens:,} tokens of {self.rows:,} rows"
        )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    max_length: int | None = 1024,
    batch_size: int = 1,
    progress: bool = True,
) -> Evaluated:
    """The mean loss of the tokens that are to be said: Σ -log p(token | what came before) / number of tokens.

    Args:
        model: a causal language model.
        tokenizer: its own.
        rows: ``text``, ``prompt`` and ``completion``, or ``messages``.
        max_length: tokens of a row, at most.
        batch_size: rows at once.

    Raises:
        ValueError: no row has a token to be said.
    """
    if rows.column_names == ["messages"]:
        rows = turn_by_turn(rows)
    model.eval()
    total, tokens = 0.0, 0
    found = batches(rows, tokenizer, max_length, batch_size, len(rows))
    for batch in tqdm(found, total=math.ceil(len(rows) / batch_size), desc="evaluating", disable=not progress):
        said = int((batch["labels"][:, 1:] != IGNORED).sum())
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
        total, tokens = total + said * float(loss), tokens + said
    if not tokens:
        raise ValueError(
            "dataset: found no token to be said within max_length; expected some. Give a larger --max-length."
        )
    return Evaluated(total / tokens, tokens, len(rows))
