"""What stands in for the hub in the tests of the paper's experiments: small models of the same kinds, and a few rows.

With QSVFT_PAPER_DATA the first rows are real ones: of ``gsm8k/``, ``commonsense/`` and ``sst2/`` in that folder.
"""

from __future__ import annotations

import itertools
import json
import os
import string
from pathlib import Path

import numpy
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessor,
)

from benchmarks.paper.scores.choices import CHOICES

BYTES = Path(__file__).parents[2] / "examples" / "base-model"
ROWS = 12
LETTERS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {
    "llama": {**LETTERS, "num_key_value_heads": 1},
    "gemma": {**LETTERS, "num_key_value_heads": 1, "head_dim": 32},
    "gpt_neox": LETTERS,
    "deberta-v2": {**LETTERS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "vit": {**LETTERS, "image_size": 32, "patch_size": 16},
}
AUTO = {"deberta-v2": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}


def save_model(folder, kind):
    """A checkpoint of a model type, with its tokenizer or image processor."""
    sizes = dict(SIZES[kind])
    if kind == "vit":
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(BYTES)
        tokenizer.save_pretrained(folder)
        special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, **special}
    config = AutoConfig.for_model(kind, **sizes)
    AUTO.get(kind, AutoModelForCausalLM).from_config(config).save_pretrained(folder)
    return folder


def real(name):
    """The first real rows of a file, None where there are none at hand."""
    folder = os.environ.get("QSVFT_PAPER_DATA")
    if folder is None or not (Path(folder) / name).is_file():
        return None
    lines = (Path(folder) / name).read_text(encoding="utf-8").splitlines()
    return lines[:ROWS]


def language_rows(fields, score="gsm8k"):
    """Rows with the columns that templates name, answered as a score reads it."""
    if set(fields) <= {"question", "answer"}:
        lines = real("gsm8k/train.jsonl")
        if lines is not None:
            return [json.loads(line) for line in lines]
    if "instruction" in fields:
        choices = CHOICES.get(score, CHOICES["arc"])[:2]
        name = {"boolq": "boolq", "openbookqa": "openbookqa"}.get(score, "arc-easy")
        lines = real(f"commonsense/{name}.train.jsonl") if score in ("gsm8k", "boolq", "arc", "openbookqa") else None
        rows = [json.loads(line) for line in lines or ()] or [
            {"prompt": f"Is {n} odd?\n\nAnswer format: {'/'.join(choices)}", "completion": choices[n % 2]}
            for n in range(ROWS)
        ]
        return [
            {"instruction": row["prompt"], "output": f"the correct answer is {said}", "answer": said}
            for row in rows
            for said in [row["completion"].removeprefix("the correct answer is ")]
        ]
    values = {
        "problem": "What is {n} + 1?", "solution": "It is \\boxed{{{m}}}.", "question": "{n} and 1?",
        "answer": "{n} + 1 = {m}\n#### {m}", "query": "Add 1 to {n}.\nGive the sum.", "response": "The answer is: {m}",
    }  # fmt: skip
    return [{name: values[name].format(n=n, m=n + 1) for name in fields} for n in range(ROWS)]


def sentence_rows(columns, regression):
    """Rows with one text or two, of two classes or of numbers."""
    texts = [columns["text"]] if isinstance(columns["text"], str) else columns["text"]
    lines = real("sst2/train.tsv") if len(texts) == 1 else None
    pairs = (
        [line.rpartition("\t")[::2] for line in lines]
        if lines is not None
        else [(f"{word} {n}", n % 2) for n, word in zip(range(ROWS), itertools.cycle(("good", "bad")), strict=False)]
    )
    return [
        {**dict.fromkeys(texts, text), columns["label"]: float(n) if regression else int(label)}
        for n, (text, label) in enumerate(pairs)
    ]


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def save_images(folder, columns):
    """Images of three classes."""
    generator = numpy.random.default_rng(0)
    pictures = [Picture.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=numpy.uint8)) for _ in range(ROWS)]
    features = Features({columns["image"]: Image(), columns["label"]: ClassLabel(names=["a", "b", "c"])})
    rows = {columns["image"]: pictures, columns["label"]: [n % 3 for n in range(ROWS)]}
    Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def fields_of(templates):
    """The columns that templates name."""
    named = itertools.chain.from_iterable(string.Formatter().parse(text) for text in templates.values())
    return {name for _, name, _, _ in named if name}


def data_of(experiment, folder):
    """Arguments of the command that give every data set of an experiment from files made in a folder."""
    given = {"train": experiment.train, **experiment.asked}
    made = []
    for number, (name, data) in enumerate(given.items()):
        place = folder / f"{number}"
        columns = data.columns or experiment.train.columns
        if experiment.kind == "images":
            save_images(place, columns)
        elif experiment.kind == "sentences":
            scores = {asked.score for asked in experiment.asked.values()}
            write_rows(place := place.with_suffix(".jsonl"), sentence_rows(columns, "stsb" in scores))
        else:
            fields = fields_of(data.templates) - {"first_line", "rest"}
            fields |= {data.first_line_of} if data.first_line_of else set()
            write_rows(place := place.with_suffix(".jsonl"), language_rows(fields, getattr(data, "score", "gsm8k")))
        made.append(f"{name}={place}")
    return made
