"""The trainers of docs/models.md: two steps each, with the vocabulary dense and in 8 bits.

Each test is a column of the table there, each of its parameters a row; ``tests/docs/test_model_tables.py`` compares.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from needs import is_before
from small_models import coefficients, save_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import qsvft
from qsvft.lean.vocabulary import QuantizedModule, vocabulary_of

WORDS = [f"w{5 + i} w{9 + i}" for i in range(8)]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %} w4 {{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} w6{% endif %}"
)


def asked(one: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": one}]


ROWS = {
    "ids": [{"input_ids": [5 + i, 9, 7, 8], "labels": [5 + i, 9, 7, 8]} for i in range(8)],
    "completions": [{"prompt": one, "completion": f" {one} w7"} for one in WORDS],
    "preferences": [{"prompt": one, "chosen": f" {one} w7", "rejected": " w30"} for one in WORDS],
    "references": [
        {"prompt": one, "chosen": f" {one} w7", "rejected": " w30", "reference": f" {one} w8"} for one in WORDS
    ],
    "judged": [{"prompt": one, "completion": f" {one} w7", "label": i % 2 == 0} for i, one in enumerate(WORDS)],
    "compared": [{"chosen": f"{one} w7", "rejected": f"{one} w30"} for one in WORDS],
    "prompts": [{"prompt": one} for one in WORDS],
    "questions": [{"prompt": asked(one)} for one in WORDS],
    "hinted": [{"prompt": asked(one), "privileged_context": "w7"} for one in WORDS],
    "chats": [{"messages": [*asked(one), {"role": "assistant", "content": "w7 w8"}]} for one in WORDS],
}


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [len(one) + 0.1 * i for i, one in enumerate(completions)]


@dataclass(frozen=True)
class Way:
    """A row of the table: where a trainer is, what it reads, and its options."""

    place: str
    rows: str
    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    model: Any = AutoModelForCausalLM
    teacher: bool = False


SHORT, WRITES = {"max_length": 32}, {"num_generations": 2, "max_completion_length": 4}
JUDGED = {"reward_funcs": reward}
# The teacher is the model itself: as it is said from TRL 1.6 on, and before.
LIVE = {"teacher_regularization": "none"} if is_before("trl", "1.6") else {"teacher_model_kind": "live"}
TRAINERS = {
    "Trainer": Way("transformers", "ids"),
    "Seq2SeqTrainer": Way("transformers", "ids", {"predict_with_generate": True}),
    "SFTTrainer": Way("trl", "completions", SHORT),
    "DPOTrainer": Way("trl", "preferences", SHORT),
    "KTOTrainer": Way("trl", "judged", SHORT),
    "RewardTrainer": Way("trl", "compared", SHORT, model=AutoModelForSequenceClassification),
    "GRPOTrainer": Way("trl", "prompts", WRITES, JUDGED),
    "RLOOTrainer": Way("trl", "prompts", WRITES, JUDGED),
    "DistillationTrainer": Way("trl", "questions", {"max_completion_length": 4}, teacher=True),
    "ORPOTrainer": Way("trl.experimental.orpo", "preferences", SHORT),
    "CPOTrainer": Way("trl.experimental.cpo", "preferences", SHORT),
    "TPOTrainer": Way("trl.experimental.tpo", "references", SHORT),
    "OnlineDPOTrainer": Way("trl.experimental.online_dpo", "prompts", {"max_new_tokens": 4}, JUDGED),
    "GMPOTrainer": Way("trl.experimental.gmpo", "prompts", WRITES, JUDGED),
    "GKDTrainer": Way("trl.experimental.gkd", "chats", {**SHORT, "max_new_tokens": 4}, teacher=True),
    "SDFTTrainer": Way("trl.experimental.sdft", "hinted", {**WRITES, "max_prompt_length": 16, "distillation_topk": 20}),
    "SDPOTrainer": Way("trl.experimental.sdpo", "questions", {**WRITES, **LIVE}, JUDGED),
}


def found(place: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError):
        pytest.skip(f"TRL {trl.__version__} has no {place}.{name}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


def two_steps(way: Way, name: str, tiny: Any, folder: Any, bits: int) -> tuple[Any, list[float], dict[str, Any]]:
    """The model, its losses, and its M from before."""
    trainer = found(way.place, name)
    config = "TrainingArguments" if name == "Trainer" else name.replace("Trainer", "Config")
    settings = found(way.place, config.replace("Seq2SeqConfig", "Seq2SeqTrainingArguments"))
    labels = {"num_labels": 1} if way.model is AutoModelForSequenceClassification else {}
    torch.manual_seed(0)
    model = way.model.from_pretrained(tiny, dtype=torch.float32, **labels)
    model = qsvft.prepare(model, 4, rank=8, quantize_embeddings=bits, progress=False)
    before = coefficients(model)
    arguments = settings(
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        **{"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1},
        **{"bf16": False, "seed": 1, "dataloader_pin_memory": False, **way.options},
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny, padding_side="left")
    tokenizer.chat_template = CHAT
    more = {**way.more, "teacher_model": AutoModelForCausalLM.from_pretrained(tiny)} if way.teacher else way.more
    data = Dataset.from_list(ROWS[way.rows])
    run = trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **more)
    run.remove_callback(transformers.trainer_callback.PrinterCallback)
    run.train()
    return run.model, [step["loss"] for step in run.state.log_history if "loss" in step], before


def check(model: Any, losses: list[float], before: dict[str, Any]) -> None:
    after = coefficients(model)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert {M.dtype for M in after.values()} == {torch.float32}
    assert [name for name in before if torch.equal(after[name], before[name])] == []


EACH = pytest.mark.parametrize("name", TRAINERS)
# What TRL says of its own: that parts are experimental, or that options will go.
OF_TRL = pytest.mark.filterwarnings("ignore")


@OF_TRL
@EACH
def test_it_trains_M(name, tiny, tmp_path):
    check(*two_steps(TRAINERS[name], name, tiny, tmp_path, 16))


@OF_TRL
@EACH
def test_it_trains_M_beside_a_vocabulary_in_8_bits(name, tiny, tmp_path):
    model, losses, before = two_steps(TRAINERS[name], name, tiny, tmp_path, 8)
    check(model, losses, before)
    held = vocabulary_of(model.get_base_model())
    assert held and all(isinstance(module, QuantizedModule) for module in held)


COLUMNS = {"trains": test_it_trains_M, "with `quantize_embeddings=8`": test_it_trains_M_beside_a_vocabulary_in_8_bits}
