"""Small checkpoints of the kinds that the paper's experiments train, and the command on them."""

import pytest
import toy_experiments as toy

from benchmarks.paper.experiment import read_experiment

FEW = ["--rows", "6", "--ask", "3", "--new-tokens", "4", "--batch-size", "2"]
SHORT = ["max_steps=2", "per_device_train_batch_size=2", "gradient_accumulation_steps=1", "save_steps=1"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A small checkpoint of an experiment's kind, made when it is asked for."""
    made = {}

    def of(experiment):
        shapes = experiment.shapes
        kind = shapes["model_type"] if not isinstance(shapes, str) else shapes.partition("-")[0]
        if kind not in made:
            made[kind] = toy.save_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


@pytest.fixture
def told(models, monkeypatch, tmp_path_factory):
    """The command that runs one method of an experiment on a small model in a folder."""
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path_factory.getbasetemp() / "prepared"))

    def of(name, method, folder, *more):
        experiment = read_experiment(name)
        (folder / "data").mkdir(exist_ok=True)
        length = [] if experiment.kind == "images" else ["max_length=1024"]
        return [
            name, "--methods", method, "--seeds", "0", "--output", str(folder / "out"),
            "--model", str(models(experiment)), "--data", *toy.data_of(experiment, folder / "data"), *FEW,
            "--set", *SHORT, *length, *more,
        ]  # fmt: skip

    return of
