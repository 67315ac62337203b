"""Each experiment is read, says what the paper says, and adapts the right layers of small models of its class."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from benchmarks.paper.counts import shape
from benchmarks.paper.experiment import FOLDER, names, read_experiment
from benchmarks.paper.labelled import OUR_OWN
from benchmarks.paper.language import chosen_rows
from benchmarks.paper.scores import SCORES
from benchmarks.paper.scores.choices import CHOICES
from benchmarks.paper.scores.glue import GLUE
from benchmarks.paper.ways import is_head, make
from qsvft.options.recipe import load_yaml, read_recipe
from qsvft.training.arguments import trainer_config

EXPERIMENTS = {name: read_experiment(name) for name in names()}
OWN = {"qsvft", "QLoRA r=16", "qsvft without calibration"}
each = pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)


def test_each_table_of_the_paper_has_its_experiments():
    tasks = ("mnli", "sst-2", "mrpc", "cola", "qnli", "qqp", "rte", "sts-b")
    images = [f"{data}-vit-{size}" for data in ("cifar100", "flowers102", "food101", "resisc45") for size in "bl"]
    models = ("gemma-2b", "gemma-7b", "llama-3-8b")
    assert set(EXPERIMENTS) == {
        *(f"{table}-{model}" for table in ("table-1", "pica") for model in models),
        *(f"table-3-{task}" for task in tasks),
        *(f"table-4-{one}" for one in images),
        *("table-2-gemma-7b", "table-5-gemma-2b", "table-8-gemma-2b", "table-10-gemma-2b", "figure-4-gemma-2b"),
        *("table-6-pythia-39k", "table-6-pythia-143k", "gsm8k-smollm2"),
    }


def test_a_file_to_be_like_is_one_of_somebodys():
    text = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yaml"))
    shared = [path.stem for path in FOLDER.glob("_*.yaml")]
    assert shared and all(f"like: {one}\n" in text for one in shared)


@each
def test_numbers_of_the_paper_are_of_what_is_asked(experiment):
    for name, numbers in {**{m.name: m.paper for m in experiment.methods.values()}, **experiment.published}.items():
        assert numbers.keys() <= {"trained", *experiment.asked}, name
        given = [numbers[one] for one in experiment.asked if one in numbers]
        assert len(given) in (0, len(experiment.asked)), f"{name}: a set without a number"
        assert all(isinstance(one, int | float) and 0 <= one <= 100 for one in given), name


@each
def test_ours_come_last_and_have_no_numbers_of_the_paper(experiment):
    order = list(experiment.methods)
    assert {"qsvft", "QLoRA r=16"} <= set(order)
    first = min(order.index(one) for one in OWN & set(order))
    assert set(order[first:]) <= OWN
    assert not any(experiment.methods[one].paper for one in order[first:])
    rows = [bool(experiment.methods[one].paper) for one in order[:first]]
    printed = not experiment.name.startswith(("figure", "gsm8k"))  # a figure is drawn, its numbers are not printed
    assert rows == [printed] * len(rows)


@each
def test_what_a_trainer_is_told_it_takes(experiment, tmp_path):
    for method in experiment.methods.values():
        given = {**experiment.training, **method.training}
        assert given["learning_rate"] > 0
        if experiment.kind == "language":
            fields = {"model": "m", "dataset": "d", "output": str(tmp_path)}
            arguments = trainer_config(read_recipe({**given, **fields}), 0.0, held_out=False)
        else:
            fields = {name: value for name, value in given.items() if name not in OUR_OWN}
            arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)
        assert arguments.learning_rate == given["learning_rate"]
        assert arguments.get_warmup_steps(1000) == 100


@each
def test_what_is_asked_has_a_score(experiment):
    known = {"language": set(SCORES), "sentences": set(GLUE), "images": {"accuracy"}}[experiment.kind]
    assert {asked.score for asked in experiment.asked.values()} <= known


METAMATH = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
NO_INPUT = METAMATH.format("") + "\n\n### Instruction:\n{}\n\n### Response:"
WITH_INPUT = (
    METAMATH.format(", paired with an input that provides further context")
    + "\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"
)


def rows_of(data, table, tmp_path):
    """The rows that an experiment's templates make of others."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(table), encoding="utf-8")  # a list, as LLM-Adapters' files are
    return list(chosen_rows(replace(data, dataset=str(path), config=None, split="train"), "rows"))


def test_metamath_is_trained_on_with_alpacas_prompts_and_asked_without_an_input(tmp_path):
    experiment = EXPERIMENTS["table-1-gemma-2b"]
    told = [{"query": "1+1?", "response": "The answer is: 2"}, {"query": "x?\nIf\n{y}", "response": "y"}]
    assert rows_of(experiment.train, told, tmp_path) == [
        {"prompt": NO_INPUT.format("1+1?"), "completion": "The answer is: 2"},
        {"prompt": WITH_INPUT.format("x?", "If\n{y}"), "completion": "y"},
    ]
    for name, columns in (("GSM8K", ("question", "answer")), ("MATH", ("problem", "solution"))):
        table = [dict(zip(columns, ("a\nb", "#### 2"), strict=True))]
        prompt = NO_INPUT.format("a\nb") + " Let's think step by step."
        assert rows_of(experiment.asked[name], table, tmp_path) == [{"prompt": prompt, "completion": "#### 2"}]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("BoolQ", "true/false"),
        ("PIQA", "solution1/solution2"),
        ("SIQA", "answer1/answer2/answer3"),
        ("HellaSwag", "ending1/ending2/ending3/ending4"),
        ("WinoGrande", "option1/option2"),
        ("ARC-e", "answer1/answer2/answer3/answer4/answer5"),
        ("ARC-c", "answer1/answer2/answer3/answer4"),
        ("OBQA", "answer1/answer2/answer3/answer4"),
    ],
)
def test_a_question_with_choices_is_asked_in_the_form_of_llm_adapters(name, choices, tmp_path):
    experiment = EXPERIMENTS["table-2-gemma-7b"]
    told = [{"instruction": f"Which? Answer format: {choices}", "input": "", "output": "it is", "answer": "it"}]
    (train,) = rows_of(experiment.train, told, tmp_path)
    told[0]["answer"] = choices.partition("/")[0]
    asked = experiment.asked[name]
    (row,) = rows_of(asked, told, tmp_path)
    assert row["completion"] in CHOICES[asked.score] and train["completion"] == "it is"
    assert re.search(asked.choices, row["prompt"])[1] == choices and set(choices.split("/")) <= set(
        CHOICES[asked.score]
    )
    blanks = " " * 16
    assert train["prompt"].split("\n")[0].endswith("request.  ") and f"\n{blanks}\n" in train["prompt"]
    assert row["prompt"].split("\n")[0].endswith("request. ") and f"\n{blanks}\n" not in row["prompt"]
    for one in (train, row):
        lines = one["prompt"].split("\n")
        assert one["prompt"].endswith(f"\n{blanks}### Response:\n{blanks}") and len(lines) == 7
        assert all(line.startswith(blanks) or not line.strip() for line in lines[1:])


SMALL = {
    "gemma": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
    "deberta-v2": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "pooler_hidden_size": 64},
    "vit": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 32},
}
MODELS = {
    "language": (AutoModelForCausalLM, "CAUSAL_LM"),
    "sentences": (AutoModelForSequenceClassification, "SEQ_CLS"),
    "images": (AutoModelForImageClassification, None),
}
LETTERS = {  # the names of every version of transformers that is taken
    "Q": r"q_proj|query_proj|query",
    "K": r"k_proj|key_proj|key",
    "V": r"v_proj|value_proj|value",
    "QKV": r"query_key_value",
    "O": r"o_proj|attention\.output\.dense|attention\.dense",
    "G": r"gate_proj",
    "U": r"up_proj|intermediate\.dense|fc1|dense_h_to_4h",
    "D": r"down_proj|\d\.output\.dense|fc2|dense_4h_to_h",
}


def small_model(experiment):
    """A random model of two layers, of an experiment's class."""
    config = shape(experiment)
    sizes = dict(SMALL[config.model_type], num_hidden_layers=2, vocab_size=128)
    if hasattr(config, "num_key_value_heads"):
        sizes["num_key_value_heads"] = 1
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return MODELS[experiment.kind][0].from_config(AutoConfig.for_model(**config.to_dict()))


def letters(model):
    """What of each block has numbers that train, in the paper's letters; {} if the blocks differ."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_head(name):
            number = re.search(r"\.(\d+)\.", name)[1]
            (letter,) = [one for one, words in LETTERS.items() if re.search(rf"[.](?:{words})[.]", name)]
            found.setdefault(number, set()).add(letter)
    blocks = list(found.values())
    return blocks[0] if len(blocks) == 2 and blocks[0] == blocks[1] else {}


SEVEN, SIX, FIVE = set("QKVOGUD"), set("QKVOUD"), set("QKVUD")
ADAPTED = {
    "table-1-gemma-2b": {
        "LoRA r=32": FIVE,
        "DoRA r=16": FIVE,
        "BOFT b=8 m=2": set("QV"),
        "VeRA r=1024": set("GU"),
        "SVFT plain": SEVEN,
        "SVFT random": SEVEN,
    },
    "table-1-llama-3-8b": {"LoRA r=1": FIVE, "SVFT plain": set("UDOG"), "SVFT random": set("UDOG")},
    "table-3-rte": {
        "LoRA r=8": SIX,
        "DoRA r=4": SIX,
        "BOFT b=8 m=2": SIX,
        "VeRA r=1024": set("QKVO"),
        "SVFT plain": SIX,
        "SVFT random": SIX,
        "qsvft": SIX,
        "QLoRA r=16": SIX,
    },
    "table-4-food101-vit-b": {
        "LoRA r=8": SIX,
        "DoRA r=1": SIX,
        "BOFT b=2 m=2": set("QV"),
        "VeRA r=256": set("QV"),
        "SVFT plain": set("QV"),
        "SVFT banded d=8": SIX,
        "qsvft": SIX,
        "QLoRA r=16": SIX,
    },
    "table-5-gemma-2b": {"SVFT top-k d=8": SEVEN, "SVFT banded d=8": SEVEN},
    "table-6-pythia-39k": {"LoRA r=4": {"QKV", "O", "U", "D"}, "SVFT random": {"QKV", "O", "U", "D"}},
}
BUILT = [
    pytest.param(EXPERIMENTS[name], EXPERIMENTS[name].methods[method], wanted, id=f"{name}-{method}")
    for name, methods in ADAPTED.items()
    for method, wanted in methods.items()
]


def batches(experiment, model):
    """Two batches for a calibration."""
    if experiment.kind == "images":
        return [{"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}] * 2
    ids = torch.randint(0, 128, (2, 8))
    return [{"input_ids": ids, "labels": torch.tensor([0, 1])}] * 2


@pytest.mark.parametrize(("experiment", "method", "wanted"), BUILT)
def test_a_method_adapts_what_the_papers_does_and_trains_the_head_whole(experiment, method, wanted, tmp_path):
    base = small_model(experiment)
    heads = {name for name, _ in base.named_parameters() if is_head(name)}
    assert bool(heads) == (experiment.kind != "language")
    if experiment.kind == "language":
        base.save_pretrained(tmp_path)

    def load(dtype):
        return base.to(getattr(torch, dtype))

    model = make(
        method, str(tmp_path), load, MODELS[experiment.kind][1], lambda: batches(experiment, base), checkpointing=False
    )
    assert letters(model) == wanted
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and is_head(name)]
    assert len(trained) == len(heads)
    for name, parameter in model.named_parameters():
        if is_head(name):
            assert parameter.is_floating_point(), f"{name}: a new head in few bits"


@each
def test_yaml_says_numbers_as_numbers(experiment):
    text = (FOLDER / f"{experiment.name}.yaml").read_text(encoding="utf-8")
    assert load_yaml(text)["about"] == experiment.about
    for method in experiment.methods.values():
        assert all(isinstance(value, str | int | float | bool | None) for value in method.training.values())
