"""Examples of a language task as token ids, read from JSON Lines: GSM8K's rows, or a prompt and its completion.

A prompt whose last line reads "Answer format: answer1/answer2" is a question with choices. Where it spells them out
("Answer1: bears Answer2: grass"), their texts are asked for in place of their numbers, which so small a model does not
learn to point at: the question alone is the prompt, and the text of the right choice the answer.
"""

from __future__ import annotations

import json
import random
import re
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
        choices: the answers that it has to choose from, the right one among them; none where it is free.
        text: the answer as it was written.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    text: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def read_examples(path: Path, tokenizer: Any, longest: int) -> list[Example]:
    """The examples of a file that have at most ``longest`` tokens; a bad line ends the program with its number."""
    found = [encode(*row, tokenizer) for row in _rows(path)]
    return [example for example in found if len(example) <= longest]


def prompts(path: Path, tokenizer: Any, longest: int, count: int) -> list[Example]:
    """The first prompts of a file as texts to be predicted whole, after their first token."""
    rows = read_examples(path, tokenizer, longest)[:count]
    return [Example(row.prompt[:1], row.prompt[1:], (), "") for row in rows]


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

    question, texts = _choices(prompt)
    if texts and answer not in texts:
        sys.exit(f"error: the answer {answer!r} is none of {', '.join(map(repr, texts))}: {prompt!r}")
    written = texts.get(answer, answer)
    choices = tuple(ids(text) for text in texts.values())
    return Example(tuple(tokenizer(question + "\n").input_ids), ids(written), choices, written)


def _choices(prompt: str) -> tuple[str, dict[str, str]]:
    """The question without its choices, and the text of each choice by its name; an open question has none."""
    asked, _, last = prompt.rpartition("\n")
    if not last.startswith(FORMAT):
        return prompt, {}
    names = last.removeprefix(FORMAT).split("/")
    marks = [f"{name.capitalize()}: " for name in names]
    if marks[0] not in asked:
        return prompt, {name: name for name in names}
    parts = re.split("|".join(map(re.escape, marks)), asked)
    if len(parts) != len(names) + 1:
        sys.exit(f"error: {len(names)} choices wanted, each once, found {len(parts) - 1}: {prompt!r}")
    return parts[0].strip(), {name: text.strip() for name, text in zip(names, parts[1:], strict=True)}


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
