"""Rows as tokens and labels: for the batches of a calibration, and to know how long the rows are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100


def encoded(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[list[int], list[int]]:
    """A row's tokens, and its labels: -100 but on what is to be learnt."""
    before, said = _parts(row)
    if isinstance(said, list):
        whole = _ids(tokenizer.apply_chat_template([*before, *said]))
        prompt = _ids(tokenizer.apply_chat_template(list(before), add_generation_prompt=True)) if before else []
    else:
        if isinstance(before, list):
            before = ""
        end = tokenizer.eos_token or ""
        whole = tokenizer(before + said + ("" if said.endswith(end) else end))["input_ids"]
        prompt = tokenizer(before)["input_ids"] if before else []
    learnt = len(prompt) if len(prompt) < len(whole) else 0
    return whole[:max_length], [*[IGNORED] * learnt, *whole[learnt:]][:max_length]


def _ids(found: Any) -> list[int]:
    return list(found["input_ids"]) if isinstance(found, Mapping) else list(found)


def _parts(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """What is given and what is to be said, each a text or turns."""
    if "messages" in row:
        turns = row["messages"]
        last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns) - 1)
        return turns[:last], turns[last : last + 1]
    said = row.get("completion", row.get("chosen", row.get("text")))
    return row.get("prompt", [] if isinstance(said, list) else ""), said


def batches(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, batch_size: int, count: int
) -> Iterator[dict[str, Tensor]]:
    """The first ``count`` batches of rows that teach something, padded on the right, as a model takes them."""
    batch: list[tuple[list[int], list[int]]] = []
    for row in rows:
        ids, labels = encoded(row, tokenizer, max_length)
        if any(label != IGNORED for label in labels[1:]):
            batch.append((ids, labels))
        if len(batch) == batch_size:
            yield _padded(batch, tokenizer)
            batch, count = [], count - 1
        if count == 0:
            return
    if batch:
        yield _padded(batch, tokenizer)


def _padded(batch: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in batch)
    pad = tokenizer.pad_token_id or 0
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in batch]),
    }
