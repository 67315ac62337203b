"""The paper's experiments, run whole on small models: what is trained, asked and scored, and never done twice."""

import json

import pytest
import toy_experiments as toy

from benchmarks.paper.__main__ import main
from benchmarks.paper.experiment import names, read_experiment

FEW = ["--rows", "6", "--ask", "3", "--new-tokens", "4", "--batch-size", "2"]
SHORT = ["max_steps=2", "per_device_train_batch_size=2", "gradient_accumulation_steps=1", "save_steps=1"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A small checkpoint of each kind, made when it is asked for."""
    made = {}

    def of(experiment):
        shapes = experiment.shapes
        kind = shapes["model_type"] if not isinstance(shapes, str) else shapes.partition("-")[0]
        if kind not in made:
            made[kind] = toy.save_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


def told(name, method, models, folder, *more):
    """The command that runs one method of an experiment on a small model."""
    experiment = read_experiment(name)
    (folder / "data").mkdir(exist_ok=True)
    length = [] if experiment.kind == "images" else ["max_length=1024"]
    return [
        name, "--methods", method, "--seeds", "0", "--output", str(folder / "out"), "--model", str(models(experiment)),
        "--data", *toy.data_of(experiment, folder / "data"), *FEW, "--set", *SHORT, *length, *more,
    ]  # fmt: skip


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
def test_an_experiment_trains_asks_and_has_its_row(name, method, models, tmp_path, capsys):
    command = told(name, method, models, tmp_path)
    assert main(command) == 0, capsys.readouterr().err
    (row,) = json.loads((tmp_path / "out" / name / "results.json").read_text())
    experiment = read_experiment(name)
    assert row["method"] == method and row["steps"] == 2 and row["trained"] + row["head"] > 0
    assert set(row["scores"]) == set(experiment.asked)
    for figures in row["scores"].values():
        assert all(-100 <= value <= 100 for value in figures.values())
    said = capsys.readouterr().out
    assert "GiB predicted" in said
    assert ("(paper" in said) == bool(experiment.methods[method].paper or experiment.published)
