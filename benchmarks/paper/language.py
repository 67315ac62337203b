"""A language model: trained by TRL on prompts and completions, asked in words, its answers written down and judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from qsvft.memory.shapes import model_without_values
from qsvft.options.recipe import Recipe, read_recipe
from qsvft.training.arguments import MAX_LENGTH, trainer_config
from qsvft.training.data import in_form
from qsvft.training.plan import base_tokenizer
from qsvft.training.tokens import IGNORED, batches, encoded

from .answers import Answers
from .experiment import Asked, Data, Experiment
from .rows import read_rows
from .scores import SCORES
from .scores.choices import CHOICES, likeliest
from .ways import Batches

TASK_TYPE = "CAUSAL_LM"


class Language:
    """See the module.

    Args:
        experiment: model, data, arguments.
        batch_size: of questions asked at once.
    """

    task_type = TASK_TYPE

    def __init__(self, experiment: Experiment, batch_size: int) -> None:
        self.experiment, self.batch_size = experiment, batch_size

    @cached_property
    def tokenizer(self) -> Any:
        """The base's."""
        return base_tokenizer(self.experiment.model)

    @cached_property
    def rows(self) -> Dataset:
        """What is trained on: prompt and completion."""
        return chosen_rows(self.experiment.train, "train")

    @cached_property
    def asked(self) -> dict[str, Dataset]:
        """What is asked, by name."""
        return {name: chosen_rows(data, f"asked: {name}") for name, data in self.experiment.asked.items()}

    def load(self, dtype: str | None, folder: Path | None = None) -> nn.Module:
        """The base, or what was saved whole in a folder."""
        return AutoModelForCausalLM.from_pretrained(str(folder or self.experiment.model), dtype=dtype or "auto")

    def without_values(self, config: Any) -> nn.Module:
        """Its shape."""
        return model_without_values(config)

    def lengths(self, most: int) -> list[int]:
        """Tokens of the first rows.

        Raises:
            ValueError: none of them has an answer within ``max_length``.
        """
        longest = self.experiment.training.get("max_length", MAX_LENGTH)
        rows = self.rows.select(range(min(most, len(self.rows))))
        found = [encoded(row, self.tokenizer, longest) for row in rows]
        if not any(label != IGNORED for _, labels in found for label in labels[1:]):
            raise ValueError(
                f"train: no row of {self.experiment.train.dataset!r} reaches its answer within max_length={longest}; "
                "expected a larger max_length"
            )
        return [len(ids) for ids, _ in found]

    def batches(self, arguments: Any, count: int) -> Batches:
        """The first of the data, for a calibration."""
        size = arguments.per_device_train_batch_size
        return list(batches(self.rows, self.tokenizer, arguments.max_length, size, count))

    def arguments(self, given: Mapping[str, Any], folder: Path) -> Any:
        """The trainer's arguments."""
        fields = {"model": self.experiment.model, "dataset": self.experiment.train.dataset, "output": str(folder)}
        recipe: Recipe = read_recipe({**given, **fields})
        return trainer_config(recipe, float(given.get("learning_rate", 0.0)), held_out=False)

    def trainer(self, model: nn.Module, arguments: Any, given: Mapping[str, Any]) -> Any:
        """TRL's, as ``qsvft train`` has it."""
        return SFTTrainer(model=model, args=arguments, train_dataset=self.rows, processing_class=self.tokenizer)

    def ask(self, model: nn.Module, name: str, folder: Path) -> dict[str, float]:
        """The part of right answers, in the words it writes, and by likelihood where there are choices."""
        asked, rows = self.experiment.asked[name], self.asked[name]
        score = SCORES[asked.score]
        answers = Answers(folder / f"{name}.jsonl", name, len(rows))
        lengths = [len(ids) for ids in self.tokenizer(list(rows["prompt"])).input_ids]
        left = sorted(answers.left(), key=lambda number: lengths[number])
        with answers.shown(len(left)) as step:
            for start in range(0, len(left), self.batch_size):
                numbers = left[start : start + self.batch_size]
                written = self._written(model, [rows[number]["prompt"] for number in numbers], asked)
                found = [{"written": text} for text in written]
                if asked.choices is not None:
                    found = [
                        {**one, "likeliest": self._likeliest(model, rows[number]["prompt"], asked)}
                        for one, number in zip(found, numbers, strict=True)
                    ]
                answers.add(dict(zip(numbers, found, strict=True)))
                step(len(numbers))
        said = answers.all()
        wanted = [_reference(asked, row["completion"]) for row in rows]
        rights = [score.right(said[number]["written"], one) for number, one in enumerate(wanted)]
        scores = {"accuracy": 100 * sum(rights) / len(rights)}
        if asked.choices is not None:
            alike = [said[number]["likeliest"] == one for number, one in enumerate(wanted)]
            scores["by likelihood"] = 100 * sum(alike) / len(alike)
        return scores

    @torch.no_grad()
    def _written(self, model: Any, prompts: Sequence[str], asked: Asked) -> list[str]:
        """What the model writes after prompts: the likeliest token each time, or of several beams."""
        self.tokenizer.padding_side = "left"
        read = self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(_device(model))
        ids = model.generate(
            **read, max_new_tokens=asked.max_new_tokens, num_beams=asked.num_beams, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        written = self.tokenizer.batch_decode(ids[:, read["input_ids"].shape[1] :], skip_special_tokens=True)
        return [until(text, asked.stop) for text in written]

    @torch.no_grad()
    def _likeliest(self, model: Any, prompt: str, asked: Asked) -> str:
        """Of the choices in a prompt the one whose tokens have the highest log probability."""
        assert asked.choices is not None
        match = re.search(asked.choices, prompt)
        if match is None:
            raise ValueError(
                f"asked: choices: {asked.choices!r} is nowhere in the prompt {prompt[:80]!r}; expected a pattern of "
                "which each prompt has one"
            )
        choices = [choice.strip() for choice in match[1].split("/")]
        before = self.tokenizer(prompt).input_ids
        rows = [self.tokenizer(prompt + asked.says.format(choice=choice)).input_ids for choice in choices]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = _device(model)
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().log_softmax(-1)
        first = min(len(before), min(map(len, rows)) - 1)
        sums = [float(_of(row, logits[n], first)) for n, row in enumerate(rows)]
        return choices[likeliest(sums)]


def until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of what it stops before."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


def _reference(asked: Asked, completion: str) -> str:
    """What is right: of a question with choices the name of one, as the completion says it."""
    return SCORES[asked.score].answer(completion) or completion if asked.score in CHOICES else completion


def _of(row: Sequence[int], logits: Tensor, first: int) -> Tensor:
    wanted = torch.tensor(row[first:], device=logits.device)
    return logits[first - 1 : len(row) - 1].gather(1, wanted.unsqueeze(1)).sum()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def chosen_rows(data: Data, where: str) -> Dataset:
    """Rows with prompt and completion; those that have both already need no template."""
    rows = read_rows(data, where)
    made = {"prompt", "completion"} <= set(rows.column_names)
    templates = None if made else data.templates
    if data.first_line_of is not None and not made:
        rows, templates = rows.map(_in_parts(data, where), desc="Templates"), None
    try:
        return in_form(rows, data.dataset, "sft", templates)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _in_parts(data: Data, where: str) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    """Fills the templates of a row whose column is taken in two parts."""
    column = data.first_line_of

    def fill(row: Mapping[str, Any]) -> dict[str, str]:
        if column not in row:
            raise ValueError(f"{where}: first_line_of: found no {column!r}; expected one of {', '.join(row)}")
        first, _, rest = str(row[column]).partition("\n")
        templates = (data.templates_with_rest if rest else data.templates) or data.templates or {}
        return {name: text.format(**row, first_line=first, rest=rest) for name, text in templates.items()}

    return fill
