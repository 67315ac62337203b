"""Fine-tune a 4-bit causal language model with qsvft, from the base to a merged model.

    python examples/finetune.py

teaches the small model of ``examples/base-model`` a task it has never seen, shifting each letter of
a word by one (``banana`` becomes ``cbobob``), then reloads and merges the result in a fresh process
and checks that all three agree.  With a model and examples of your own:

    python examples/finetune.py --model meta-llama/Llama-3.2-1B --dataset mine.jsonl --output adapter

where every line of ``mine.jsonl`` reads ``{"prompt": "...", "completion": "..."}``.
"""

# ruff: noqa: E402

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

# CPU threads that wait should sleep, not spin: on a busy machine that is several times as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Warnings that concern nobody here: bitsandbytes' of a CPU kernel that qsvft has no use for and of each 8-bit
# product, and one about a property's old name that PEFT uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from string_task import shift_examples
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import qsvft

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE_MODEL = Path(__file__).resolve().parent / "base-model"
TRAINED_ON, HELD_OUT = 3200, 200  # how many examples of the built-in task
CALIBRATED_ON = 4  # batches
# By how much a step changes a weight, in units of the weight. The built-in task is all new to the small model; what a
# large one is fine-tuned on is not, and takes what qsvft suggests.
OWN_RATE, OWN_RANK = 4e-1, 64
IGNORED = -100  # the label of a token that the loss leaves out


def read_examples(path):
    """The examples of a JSON Lines file; a bad line ends the program with its number."""
    examples = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read {path}: {error}")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = {key: row[key] for key in ("prompt", "completion")}
        except ValueError as error:
            sys.exit(f"error: {path}, line {number}: not JSON ({error})")
        except (KeyError, TypeError):
            sys.exit(f'error: {path}, line {number}: wants an object with "prompt" and "completion"')
        if not all(isinstance(text, str) and text for text in example.values()):
            sys.exit(f'error: {path}, line {number}: "prompt" and "completion" must be text, not empty')
        examples.setdefault(example["prompt"], example)  # so that no prompt is both trained on and held out
    if len(examples) < 2:
        sys.exit(f"error: {path}: wants at least two examples with different prompts")
    return list(examples.values())


def load_examples(options):
    """The examples to train on, and those held out."""
    if options.dataset:
        examples = read_examples(options.dataset)
        random.Random(options.seed).shuffle(examples)
        held_out = min(HELD_OUT, max(1, len(examples) // 10))
    else:
        examples = shift_examples(TRAINED_ON + HELD_OUT, options.seed)
        held_out = HELD_OUT
    return examples[held_out:], examples[:held_out]


def load_tokenizer(name):
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # to generate; training pads by itself, on the right
    return tokenizer


def load_model(name):
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(DEVICE)


def encode(example, tokenizer):
    """Token ids and labels: the loss is on the completion and the token that ends it."""
    prompt = tokenizer(example["prompt"]).input_ids
    completion = tokenizer(example["completion"], add_special_tokens=False).input_ids
    completion.append(tokenizer.eos_token_id)
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def collate(rows, pad):
    """A batch of encoded examples, padded on the right."""
    ids, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
    mask = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


@torch.no_grad()
def answers(model, tokenizer, examples, batch_size=100):
    """What the model writes after each prompt, decoding greedily."""
    model.eval()
    ends = [tokenizer(example["completion"], add_special_tokens=False).input_ids for example in examples]
    longest = max(map(len, ends)) + 1
    texts = []
    for start in range(0, len(examples), batch_size):
        prompts = [example["prompt"] for example in examples[start : start + batch_size]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt").to(DEVICE)
        written = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=longest,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(written[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(texts, examples):
    """The share of `texts` that are exactly the completions of `examples`."""
    pairs = zip(texts, examples, strict=True)
    return sum(text.strip() == example["completion"].strip() for text, example in pairs) / len(examples)


@torch.no_grad()
def logits(model, tokenizer, examples):
    """The logits of every token of (at most 32 of) the examples, one row a token."""
    model.eval()
    batch = collate([encode(example, tokenizer) for example in examples[:32]], tokenizer.pad_token_id)
    del batch["labels"]
    batch = {key: value.to(DEVICE) for key, value in batch.items()}
    return model(**batch).logits[batch["attention_mask"].bool()].float().cpu()


def batches(examples, tokenizer, options):
    """A few batches to take the directions from."""
    for start in range(0, CALIBRATED_ON * options.batch_size, options.batch_size):
        rows = [encode(example, tokenizer) for example in examples[start : start + options.batch_size]]
        if rows:
            yield collate(rows, tokenizer.pad_token_id)


def train(model, tokenizer, examples, options):
    """Train M with the Trainer of transformers."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=options.epochs,
            max_steps=options.steps or -1,
            learning_rate=options.learning_rate or qsvft.suggest_learning_rate(model),
            lr_scheduler_type="cosine",
            warmup_steps=10,
            weight_decay=0.0,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=DEVICE == "cuda",
            seed=options.seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[encode(example, tokenizer) for example in examples],
            data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
            callbacks=[qsvft.StopAtNaN()],
        )
        trainer.train()


def verify(options, tokenizer, held_out):
    """In a fresh process: reload the adapter, compare its logits with the saved ones, merge, compare again."""
    expected = torch.load(options.verify)
    base = qsvft.quantize(load_model(options.model), bits=options.bits)
    model = PeftModel.from_pretrained(base, options.output)
    reloaded = logits(model, tokenizer, held_out)
    model = model.merge_and_unload()
    merged = logits(model, tokenizer, held_out)
    found = {
        "reloaded": (reloaded - expected).abs().max().item(),
        "merged": (merged - expected).abs().max().item(),
        "answers": answers(model, tokenizer, held_out),
    }
    print(json.dumps(found))


def verify_in_fresh_process(expected, output):
    """Run this script again with the same options, to `verify` the adapter in `output`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "logits.pt"
        torch.save(expected, path)
        command = [sys.executable, __file__, *sys.argv[1:], "--output", str(output), "--verify", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("error: the adapter could not be reloaded and merged in a fresh process")
    return json.loads(done.stdout.splitlines()[-1])


def show(console, figures, output):
    """The closing table."""
    share = figures["trainable_parameters"] / figures["base_parameters"]
    table = Table(show_header=False)
    table.add_row("accuracy before", f"{figures['accuracy_before']:.1%}")
    table.add_row("accuracy after", f"[bold green]{figures['accuracy_after']:.1%}")
    table.add_row("accuracy, merged", f"{figures['accuracy_merged']:.1%}")
    table.add_row("trainable parameters", f"{figures['trainable_parameters']:,} ({share:.2%} of the base's)")
    for kind, count in figures["bytes"].items():
        table.add_row(f"bytes: {kind}", f"{count:,}")
    table.add_row("seconds", f"{figures['seconds']:.0f}")
    table.add_row("adapter", str(output))
    console.print(table)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=str(BASE_MODEL), help="a folder or a name on the Hub (default: the small base model)")
    add("--dataset", help='JSON Lines of {"prompt": ..., "completion": ...} (default: the letter-shifting task)')
    add("--output", type=Path, default=Path("out"), help="where to save the adapter (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add(
        "--learning-rate",
        type=float,
        help=f"default: {OWN_RATE:g}; with a model or a dataset of your own what qsvft suggests",
    )
    add("--epochs", type=float, default=1, help="default: %(default)s")
    add("--steps", type=int, help="batches to train on, instead of epochs")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--rank", type=int, help=f"directions of each side of a weight (default: {OWN_RANK}, else the library's)")
    add("--bits", type=int, default=4, help="of the frozen base (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--verify", help=argparse.SUPPRESS)
    options = parser.parse_args()
    own = options.dataset is None and options.model == str(BASE_MODEL)
    if options.learning_rate is None and own:
        options.learning_rate = OWN_RATE
    if options.rank is None and own:
        options.rank = OWN_RANK
    return options


def main():
    options, console, started = parse(), Console(), time.monotonic()
    examples, held_out = load_examples(options)
    tokenizer = load_tokenizer(options.model)
    if options.verify:
        return verify(options, tokenizer, held_out)

    model = load_model(options.model)
    figures = {"base_parameters": model.num_parameters()}
    model = qsvft.prepare(
        model, bits=options.bits, rank=options.rank, calibration=batches(examples, tokenizer, options)
    )
    figures["trainable_parameters"], _ = model.get_nb_trainable_parameters()
    figures["bytes"] = qsvft.held_bytes(model)
    figures["accuracy_before"] = accuracy(answers(model, tokenizer, held_out), held_out)
    console.print(f"before: {figures['accuracy_before']:.1%} of {len(held_out)} held-out examples are exactly right")

    train(model, tokenizer, examples, options)
    after = answers(model, tokenizer, held_out)
    figures["accuracy_after"] = accuracy(after, held_out)
    for example, text in list(zip(held_out, after, strict=True))[:3]:
        console.print(f"{example['prompt'].strip()} -> {text.strip()}", markup=False, highlight=False)

    model.save_pretrained(options.output)
    found = verify_in_fresh_process(logits(model, tokenizer, held_out), options.output.resolve())
    same = sum(one == other for one, other in zip(after, found["answers"], strict=True))
    figures["accuracy_merged"] = accuracy(found["answers"], held_out)
    figures["max_logit_difference"] = {kind: found[kind] for kind in ("reloaded", "merged")}
    figures["seconds"] = time.monotonic() - started
    console.print(
        f"in a fresh process: reloaded, the logits differ by {found['reloaded']:g}; merged, by at most "
        f"{found['merged']:.3g}, with {same} of {len(held_out)} answers the same"
    )
    show(console, figures, options.output)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
