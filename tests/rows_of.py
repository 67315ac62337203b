"""Small data sets on disk, in words that the small checkpoints' tokenizer knows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

TEMPLATE = "{% for turn in messages %}{{ 'w4 ' if turn.role == 'user' else 'w5 ' }}{{ turn.content + ' ' }}{% endfor %}"


def words(draw: random.Random, count: int) -> str:
    """Which a model can learn: each follows the one before it."""
    first = draw.randrange(6, 40)
    return " ".join(f"w{first + i}" for i in range(count))


def rows_of(kind: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows of one of the forms that ``qsvft train`` takes."""
    draw = random.Random(kind)
    return [_row(kind, draw) for _ in range(count)]


def _row(kind: str, draw: random.Random) -> dict[str, Any]:
    prompt, said = words(draw, 4), words(draw, 6)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
    return {
        "text": {"text": said},
        "prompt": {"prompt": f"{prompt} ", "completion": said},
        "question": {"question": prompt, "answer": said, "number": draw.randrange(9)},
        "messages": {"messages": [*turns, {"role": "user", "content": said}, {"role": "assistant", "content": prompt}]},
        "preference": {"prompt": f"{prompt} ", "chosen": said, "rejected": words(draw, 6)},
    }[kind]


def write_rows(folder: Path, kind: str, count: int = 24) -> Path:
    """The rows as JSON Lines."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows_of(kind, count)), encoding="utf-8")
    return path


def give_template(model: Path) -> None:
    """A chat template that marks nothing of what the assistant says."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
