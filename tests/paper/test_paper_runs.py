"""The paper's experiments, run whole on small models: what is trained, asked and scored, and never done twice."""

import dataclasses
import json

import pytest
import torch
import toy_experiments as toy
from safetensors.torch import load_file

from benchmarks.paper.__main__ import main
from benchmarks.paper.experiment import names, read_experiment
from benchmarks.paper.images import Images
from benchmarks.paper.language import Language, chosen_rows, until


def runnable(experiment):
    """Methods whose ranks are not those of a wide model's factors."""
    return [one for one in experiment.methods.values() if not (one.way == "QSVFT" and one.options.get("rank"))]


def rotated():
    """Every experiment with one of its methods, such that each way has its turn."""
    turns = {}
    for name in names():
        experiment = read_experiment(name)
        methods = runnable(experiment)
        turn = turns[experiment.kind] = turns.get(experiment.kind, -1) + 1
        yield pytest.param(name, methods[turn % len(methods)].name, id=name)


@pytest.mark.parametrize(("name", "method"), list(rotated()))
def test_an_experiment_trains_asks_and_has_its_row(name, method, told, tmp_path, capsys):
    command = told(name, method, tmp_path)
    assert main(command) == 0, capsys.readouterr().err
    (row,) = json.loads((tmp_path / "out" / name / "results.json").read_text())
    experiment = read_experiment(name)
    assert row["method"] == method and row["steps"] == 2 and row["trained"] + row["head"] > 0
    assert set(row["scores"]) == set(experiment.asked)
    assert row["machine"] and row["commit"] and row["versions"].keys() > {"torch", "peft", "qsvft"}
    for figures in row["scores"].values():
        assert all(-100 <= value <= 100 for value in figures.values())
    said = capsys.readouterr().out
    assert "GiB predicted" in said
    assert ("(paper" in said) == bool(experiment.methods[method].paper or experiment.published)


# The parts


def of_kind(kind, experiment, tmp_path, models, **changes):
    """A kind on the small data of an experiment."""
    found = read_experiment(experiment)
    (tmp_path / "data").mkdir()
    given = dict(text.split("=", 1) for text in toy.data_of(found, tmp_path / "data"))
    train = dataclasses.replace(found.train, dataset=given["train"], config=None, **changes)
    return kind(dataclasses.replace(found, train=train, model=str(models(found))), 2)


def test_the_head_alone_moves_nothing_else(told, tmp_path, models):
    assert main(told("table-4-cifar100-vit-b", "Head alone", tmp_path, "learning_rate=0.1")) == 0
    (saved,) = tmp_path.rglob("model/model.safetensors")
    after = load_file(saved)
    before = load_file(models(read_experiment("table-4-cifar100-vit-b")) / "model.safetensors")
    others = [name for name in after if not name.startswith("classifier.")]
    assert others and all(torch.equal(after[name], before[name]) for name in others)
    (row,) = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert row["trained"] == 0 and row["head"] == sum(
        after[f"classifier.{name}"].numel() for name in ("weight", "bias")
    )


def test_the_head_has_its_own_learning_rate(tmp_path, models):
    images = of_kind(Images, "table-4-cifar100-vit-b", tmp_path, models)
    model = images.load("float32")
    arguments = images.arguments({"learning_rate": 1e-3}, tmp_path / "out")
    for given, expected in (({"head_learning_rate": 5e-2}, 5e-2), ({}, 1e-3)):
        groups = images.trainer(model, arguments, given).optimizer.param_groups
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        found = {rates[id(p)] for name, p in model.named_parameters() if name.startswith("classifier.")}
        assert found == {expected}
        assert {rates[id(p)] for name, p in model.named_parameters() if not name.startswith("classifier.")} == {1e-3}


def test_of_each_class_the_first_so_many_rows_are_taken(tmp_path, models):
    images = of_kind(Images, "table-4-cifar100-vit-b", tmp_path, models, per_class=2)
    labels = [images.rows[number]["labels"] for number in range(len(images.rows))]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
    assert images.rows[0]["pixel_values"].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("so 4.\nQuestion: 5", ["USER", "Question:"], "so 4.\n"),
        ("a b c", ["c", "b"], "a "),
        ("a", ["b"], "a"),
        ("a", [], "a"),
    ],
)
def test_an_answer_ends_before_the_first_of_what_it_stops_at(text, stop, left):
    assert until(text, stop) == left


def test_a_query_of_several_lines_is_an_instruction_and_an_input(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"query": "Add {1} to 2.\nGive the sum.\nNow.", "response": "3"}, {"query": "Add.", "response": "4"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = dataclasses.replace(read_experiment("table-1-gemma-2b").train, dataset=str(path), config=None)
    with_rest, alone = chosen_rows(data, "train")
    assert with_rest["prompt"].endswith(
        "### Instruction:\nAdd {1} to 2.\n\n### Input:\nGive the sum.\nNow.\n\n### Response:"
    )
    assert "provides further context" in with_rest["prompt"] and "### Input" not in alone["prompt"]
    assert alone["prompt"].endswith("### Instruction:\nAdd.\n\n### Response:") and alone["completion"] == "4"


def test_the_likeliest_choice_is_the_one_of_the_highest_probability(tmp_path, models):
    language = of_kind(Language, "table-2-gemma-7b", tmp_path, models)
    asked = dataclasses.replace(language.experiment.asked["ARC-e"], says="{choice}")
    prompt = "Which?\n\nAnswer format: answer1/answer2/answer3\nSo:"
    for seed in range(4):
        torch.manual_seed(seed)
        model = language.load("float32")
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        sums = {}
        start = len(language.tokenizer(prompt).input_ids)
        for choice in ("answer1", "answer2", "answer3"):
            ids = torch.tensor([language.tokenizer(prompt + choice).input_ids])
            with torch.no_grad():
                logits = model(input_ids=ids).logits.double().log_softmax(-1)
            sums[choice] = sum(float(logits[0, at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))
        assert language._likeliest(model, prompt, asked) == max(sums, key=sums.get)


def test_a_prompt_without_choices_is_refused(tmp_path, models):
    language = of_kind(Language, "table-2-gemma-7b", tmp_path, models)
    with pytest.raises(ValueError, match=r"asked: choices: .* is nowhere in the prompt 'Which\?'"):
        language._likeliest(language.load("float32"), "Which?", language.experiment.asked["ARC-e"])
