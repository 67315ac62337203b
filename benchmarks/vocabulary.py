"""What holding the token embeddings and the output head in 8 or 4 bits costs in accuracy.

    python benchmarks/vocabulary.py [--examples 2000] [--json FILE]
    python benchmarks/vocabulary.py --minilm DIR --sentences FILE

On the shipped base model, its linears in NF4 and its tied weight untied, so that each of the two can be held alone:
the relative error of the rows and of the logits against the same model with a bf16 vocabulary, and the loss (nats a
token) on fresh examples of the string tasks that the model knows, and on the docstrings of Python's standard library
(which it has read, but hardly learned). With ``--minilm``, a folder with a MiniLM sentence
encoder as transformers saves it: the error of its word embeddings, and the cosine between the sentence embeddings of
its bf16 and its rounded vocabulary, over the first column of a tab-separated file.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import qsvft
from qsvft.lean.vocabulary import quantize_embeddings
from qsvft.storage.stored_matrix import StoredMatrix

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import finetune
import pretrain
from string_task import known_example, made_up_word

PARTS = {"embeddings": ["lm_head"], "head": ["embed_tokens"], "both": []}
Rows = list[dict[str, Any]]


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def row_error(weight: Tensor, bits: int) -> float:
    """Relative error of a weight that is held in some bits."""
    return relative(StoredMatrix.hold(weight, bits).dense(), weight)


def untied_base() -> PreTrainedModel:
    """The shipped base model with its linears in NF4, embeddings and head as two weights in bf16."""
    model = AutoModelForCausalLM.from_pretrained(finetune.BASE_MODEL, dtype=torch.bfloat16)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.config.tie_word_embeddings = False
    qsvft.quantize(model, 4, progress=False)
    return model.eval()


def task_batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Examples of the tasks that the model was pretrained on, about words that it has not seen."""
    rng = random.Random(f"{seed}/vocabulary")
    tokenizer = finetune.load_tokenizer(finetune.BASE_MODEL)
    words = [made_up_word(rng) for _ in range(1000)]
    examples = [known_example(rng, words) for _ in range(count)]
    rows = [finetune.encode(example, tokenizer) for example in examples]
    return [finetune.collate(rows[start : start + 100], tokenizer.pad_token_id) for start in range(0, count, 100)]


@torch.inference_mode()
def logits_and_loss(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[Tensor, float]:
    """The logits that the loss reads, a row each, and the loss of a token."""
    logits, labels = [], []
    for batch in batches:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        wanted = batch["labels"][:, 1:]
        counted = wanted != finetune.IGNORED
        logits.append(found[counted].float())
        labels.append(wanted[counted])
    rows = torch.cat(logits)
    return rows, float(nn.functional.cross_entropy(rows, torch.cat(labels)))


def text_batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Windows of 128 tokens of the standard library's docstrings."""
    rng = random.Random(f"{seed}/text")
    tokenizer = finetune.load_tokenizer(finetune.BASE_MODEL)
    stream = torch.tensor(tokenizer("\n\n".join(pretrain.docstrings()), verbose=False).input_ids)
    starts = [rng.randrange(len(stream) - pretrain.TEXT_LENGTH) for _ in range(count)]
    rows = torch.stack([stream[start : start + pretrain.TEXT_LENGTH] for start in starts])
    return [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in rows.split(50)]


def shipped(count: int, seed: int) -> Rows:
    tasks, text, base = task_batches(count, seed), text_batches(count // 10, seed), untied_base()
    weight = base.get_input_embeddings().weight.detach()
    expected, loss = logits_and_loss(base, tasks)
    text_loss = logits_and_loss(base, text)[1]
    exact = {"rows": 0.0, "logits": 0.0, "loss": loss, "change": 0.0, "text_loss": text_loss, "text_change": 0.0}
    rows: Rows = [{"held": "as it is", "bits": 16, **exact}]
    for part, skip in PARTS.items():
        for bits in (8, 4):
            model = quantize_embeddings(copy.deepcopy(base), bits, skip)
            found, after = logits_and_loss(model, tasks)
            row = {"rows": row_error(weight, bits), "logits": relative(found, expected)}
            row |= {"loss": after, "change": after - loss}
            after = logits_and_loss(model, text)[1]
            rows.append({"held": part, "bits": bits, **row, "text_loss": after, "text_change": after - text_loss})
    return rows


@torch.inference_mode()
def sentence_embeddings(model: PreTrainedModel, tokenizer: Any, sentences: list[str]) -> Tensor:
    """The mean over a sentence's tokens of the last hidden states, as MiniLM is used."""
    means = []
    for start in range(0, len(sentences), 64):
        batch = tokenizer(sentences[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state.float()
        mask = batch.attention_mask.unsqueeze(-1).float()
        means.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(means)


def minilm(folder: Path, sentences: list[str]) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    weight = base.get_input_embeddings().weight.detach()
    expected = sentence_embeddings(base, tokenizer, sentences)
    rows: Rows = []
    for bits in (8, 4):
        model = quantize_embeddings(copy.deepcopy(base), bits)
        cosine = nn.functional.cosine_similarity(sentence_embeddings(model, tokenizer, sentences), expected)
        error = {"rows": row_error(weight, bits), "cosine": float(cosine.mean()), "least_cosine": float(cosine.min())}
        rows.append({"bits": bits, **error})
    return rows


def show(console: Console, title: str, columns: dict[str, tuple[str, str]], rows: Rows) -> None:
    table = Table(title=title)
    for heading, _ in columns.values():
        table.add_column(heading)
    for row in rows:
        table.add_row(*(format(row[key], spec) for key, (_, spec) in columns.items()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="of the string tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minilm", type=Path, help="a folder with MiniLM's weights and tokenizer")
    parser.add_argument("--sentences", type=Path, help="a file of sentences, one a line, up to a tab")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if (options.minilm is None) != (options.sentences is None):
        parser.error("--minilm and --sentences go together")
    transformers_logging.disable_progress_bar()
    console = Console(width=110)
    figures: dict[str, Any] = {"shipped": shipped(options.examples, options.seed)}
    columns = {"held": ("held in fewer bits", ""), "bits": ("bits", ""), "rows": ("error of rows", ".2e")}
    columns |= {"logits": ("error of logits", ".2e"), "loss": ("loss, tasks", ".4f"), "change": ("change", "+.4f")}
    columns |= {"text_loss": ("loss, text", ".4f"), "text_change": ("change", "+.4f")}
    show(console, f"The shipped model, {options.examples} fresh examples", columns, figures["shipped"])
    if options.minilm is not None:
        lines = options.sentences.read_text(encoding="utf-8").splitlines()
        sentences = [line.split("\t")[0] for line in lines if line.strip()]
        figures["minilm"] = minilm(options.minilm, sentences)
        columns = {"bits": ("bits", ""), "rows": ("error of rows", ".2e")}
        columns |= {"cosine": ("mean cosine", ".6f"), "least_cosine": ("least cosine", ".6f")}
        show(console, f"MiniLM, {len(sentences)} sentences", columns, figures["minilm"])
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        about |= {"examples": options.examples, "seed": options.seed}
        options.json.write_text(json.dumps({"about": about, **figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
