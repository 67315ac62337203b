"""Pretrain the small base model of the examples, from nothing but the Python standard library.

A byte-level Llama of three million parameters reads the docstrings of the standard library's
modules and practises the string tasks of ``string_task.py``.  It takes about twenty minutes on two
CPU cores:

    python examples/pretrain.py --output examples/base-model

An interrupted run goes on from its last checkpoint when it is started again with the same options.
"""

import argparse
import ast
import math
import os
import platform
import random
import shutil
import sysconfig
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait sleep, which suits a busy machine

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from string_task import KNOWN, LETTERS, LONGEST, SHORTEST, known_example
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

CONTEXT = 256  # the longest sequence, in bytes
TASKS, TEXTS, TEXT_LENGTH = 64, 4, 128  # what one batch holds
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 100, 0.1
CHECKPOINT_EVERY = 250

CARD = """\
---
license: apache-2.0
library_name: transformers
---

# A small base model for the examples

A byte-level Llama with {parameters:,} parameters ({layers} layers, width {width}, bf16). It exists so that the
examples can fine-tune a real pretrained model in a minute or two on a CPU, offline.

## Training

    python examples/pretrain.py --steps {steps} --seed {seed}

Trained from scratch on the docstrings of Python {python}'s standard library ({characters:,} characters)
and on examples, made up as it trains, of the string tasks in `examples/string_task.py`:
{tasks}.
The mean loss over the last 100 steps was {task_loss:.4f} nats a byte on completions and {text_loss:.2f} on text.

Each task is asked as `reverse: banana` and a newline, answered `ananab`, and closed by `</s>`. Of {asked:,} fresh
examples, {right:.1%} were answered exactly right (in bf16, greedy).

## Limits

It writes no sensible English and knows no facts. Its tasks work on words of 3 to 8 lowercase letters;
longer words and other characters mostly fail. Do not use it for anything but trying out code.

## Licence

Apache-2.0. The docstrings it read are part of Python, under the PSF licence.
"""


def byte_tokenizer():
    """One token for each of the 256 bytes, after the three special ones."""
    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer):
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def docstrings():
    """Every docstring of the standard library's own modules, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        tree = ast.parse(path.read_bytes())
        nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
        found += [text for node in nodes if (text := ast.get_docstring(node))]
    return found


def short_words(texts):
    """The lowercase words in `texts` that are as long as the words of the string tasks."""
    words = {word for text in texts for word in text.split()}
    return sorted(word for word in words if set(word) <= set(LETTERS) and SHORTEST <= len(word) <= LONGEST)


class Batches:
    """The batch of each step, drawn from the seed and the step's number alone."""

    def __init__(self, tokenizer, texts, seed):
        self.tokenizer, self.seed = tokenizer, seed
        self.words = short_words(texts)
        self.stream = torch.tensor(tokenizer("\n\n".join(texts), verbose=False).input_ids)

    def tasks(self, rng):
        examples = [known_example(rng, self.words) for _ in range(TASKS)]
        prompts = self.tokenizer([one["prompt"] for one in examples]).input_ids
        answers = self.tokenizer([one["completion"] for one in examples], add_special_tokens=False)
        rows, labels = [], []
        for prompt, answer in zip(prompts, answers.input_ids, strict=True):
            answer = [*answer, self.tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(rows, True, self.tokenizer.pad_token_id), pad(labels, True, -100)

    def text(self, rng):
        starts = [rng.randrange(len(self.stream) - TEXT_LENGTH) for _ in range(TEXTS)]
        rows = torch.stack([self.stream[start : start + TEXT_LENGTH] for start in starts])
        return rows, rows

    def at(self, step):
        rng = random.Random(f"{self.seed}/{step}")
        return self.tasks(rng), self.text(rng)


def rate(step, steps):
    """The learning rate: a short warm-up, then a cosine down to a fiftieth."""
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / WARM_UP
    share = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LEARNING_RATE * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def save_checkpoint(path, **state):
    """Write `state` so that `path` is always a whole checkpoint, old or new."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def train(model, batches, steps, checkpoint):
    """Train `model` in place; return the mean losses (tasks, text) of the last 100 steps."""
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    first, losses = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, losses = state["step"], state["losses"]
    columns = (TextColumn("pretraining"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    told = TextColumn("tasks {task.fields[tasks]:.3f}  text {task.fields[text]:.2f}")
    with Progress(*columns, told, TimeRemainingColumn()) as progress:
        bar = progress.add_task("", total=steps, completed=first, tasks=math.nan, text=math.nan)
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps)
            both = []
            for rows, labels in batches.at(step):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(input_ids=rows, labels=labels).loss
                loss.backward()
                both.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses = [*losses[-99:], both]
            tasks, text = (sum(column) / len(losses) for column in zip(*losses, strict=True))
            progress.update(bar, advance=1, tasks=tasks, text=text)
            if (step + 1) % CHECKPOINT_EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(checkpoint, **state, step=step + 1, losses=losses)
    return tasks, text


@torch.inference_mode()
def share_right(model, tokenizer, examples):
    """The share of `examples` that greedy decoding answers exactly."""
    tokenizer.padding_side = "left"
    asked = tokenizer([one["prompt"] for one in examples], padding=True, return_tensors="pt")
    written = model.generate(
        input_ids=asked.input_ids, attention_mask=asked.attention_mask, max_new_tokens=20, do_sample=False
    )
    answers = tokenizer.batch_decode(written[:, asked.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(answer == one["completion"] for answer, one in zip(answers, examples, strict=True)) / len(examples)


def save(model, card, output):
    """Write the finished model beside `output`, then move it into place."""
    unfinished = Path(tempfile.mkdtemp(prefix=f"{output.name}.", dir=output.parent))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ends)
    model.save_pretrained(unfinished)
    byte_tokenizer().save_pretrained(unfinished)
    settings = unfinished / "tokenizer_config.json"  # with the class's name that transformers 4 knows too
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (unfinished / "README.md").write_text(card)
    for path in unfinished.iterdir():
        path.chmod(0o644)
    unfinished.chmod(0o755)
    if output.exists():
        shutil.rmtree(output)
    unfinished.rename(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--output", type=Path, default=here / "base-model", help="the folder to write")
    parser.add_argument("--steps", type=int, default=2500, help="batches to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the batches")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads to use")
    options = parser.parse_args()

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    output = options.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = output.parent / f".{output.name}-{options.steps}-{options.seed}.checkpoint"

    texts, tokenizer = docstrings(), byte_tokenizer()
    model, batches = new_model(tokenizer), Batches(tokenizer, texts, options.seed)
    task_loss, text_loss = train(model, batches, options.steps, checkpoint)

    model = model.to(torch.bfloat16).eval()
    rng = random.Random(f"{options.seed}/held out")
    asked = [known_example(rng, batches.words) for _ in range(1000)]
    right = share_right(model, tokenizer, asked)
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        steps=options.steps,
        seed=options.seed,
        python=platform.python_version(),
        characters=sum(map(len, texts)),
        tasks=", ".join(KNOWN),
        task_loss=task_loss,
        text_loss=text_loss,
        asked=len(asked),
        right=right,
    )
    save(model, card, output)
    checkpoint.unlink(missing_ok=True)
    print(f"{output}: task loss {task_loss:.4f}, text loss {text_loss:.2f}, {right:.1%} of {len(asked)} tasks right")


if __name__ == "__main__":
    main()
