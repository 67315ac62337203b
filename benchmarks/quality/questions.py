"""Examples of a language task as token ids, read from JSON Lines: GSM8K's rows, or a prompt and its completion.

A prompt whose last line reads "Answer format: answer1/answer2/answer3" is a question with choices. They have to agree
in all tokens before the first in which they differ, so that one forward tells the likelihood of each.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import string_task

IGNORED = -100
FORMAT = "Answer format: "
SHIFT, SHIFTED, SHIFT_SEED = "shift", 4200, 0

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    Attributes:
        prompt, answer: token ids; the answer ends with the token that ends a text.
        choices: of each choice, the token in which it differs from the others.
        place: where in the answer that token stands.
        text: the answer as it was written.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choices: tuple[int, ...]
    place: int
    text: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def read_examples(path: Path, tokenizer: Any, longest: int) -> list[Example]:
    """The examples of a file that have at most ``longest`` tokens; a bad line ends the program with its number."""
    found = [encode(*row, tokenizer) for row in _rows(path)]
    return [example for example in found if len(example) <= longest]


def shift_examples(tokenizer: Any, held_out: int) -> tuple[list[Example], list[Example]]:
    """The demo's task, which the shipped model has never seen: some held out, and the others."""
    rows = string_task.shift_examples(SHIFTED, SHIFT_SEED)
    found = [encode(row["prompt"].removesuffix("\n"), row["completion"], tokenizer) for row in rows]
    return found[:held_out], found[held_out:]


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        sys.exit(f"error: cannot read {path}: {error}")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            yield (row["question"], row["answer"]) if "question" in row else (row["prompt"], row["completion"])
        except (ValueError, KeyError, TypeError):
            sys.exit(f'error: {path}, line {number}: wants {{"question", "answer"}} or {{"prompt", "completion"}}')


def encode(prompt: str, answer: str, tokenizer: Any) -> Example:
    """An example of two texts."""

    def ids(text: str) -> tuple[int, ...]:
        return (*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id)

    last = prompt.rpartition("\n")[2]
    names = last.removeprefix(FORMAT).split("/") if last.startswith(FORMAT) else []
    choices, place = _told_apart([ids(name) for name in names])
    return Example(tuple(tokenizer(prompt + "\n").input_ids), ids(answer), choices, place, answer)


def _told_apart(answers: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
    """The tokens in which the answers differ, and where they stand; none where there are no choices."""
    for place, tokens in enumerate(zip(*answers, strict=False)):
        if len(set(tokens)) == len(tokens):
            return tokens, place
        if len(set(tokens)) > 1:
            break
    if answers:
        sys.exit(f"error: choices that one token does not tell apart: {answers}")
    return (), 0


def batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Batches of examples of about the same length, shortest first."""
    ordered = sorted(examples, key=len)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def shuffled(examples: Sequence[Example], steps: int, size: int, seed: int) -> list[list[Example]]:
    """One epoch over as many examples as the steps take."""
    if len(examples) < steps * size:
        sys.exit(f"error: {len(examples)} examples to train on; {steps} steps of {size} want {steps * size}")
    found = batches(random.Random(seed).sample(examples, steps * size), size)
    random.Random(seed).shuffle(found)
    return found


def collate(rows: Sequence[Example], pad: int) -> Batch:
    """Ids and labels, padded on the right; a causal model needs no mask for that."""
    longest = max(map(len, rows))
    ids, labels = torch.full((len(rows), longest), pad), torch.full((len(rows), longest), IGNORED)
    for row, example in enumerate(rows):
        ids[row, : len(example)] = torch.tensor(example.prompt + example.answer)
        labels[row, len(example.prompt) : len(example)] = torch.tensor(example.answer)
    return {"input_ids": ids, "labels": labels}
