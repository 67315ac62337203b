"""A run of the paper's experiments that is cut off anywhere goes on, and what is done is not done again."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from small_models import same_tensors
from transformers import TrainerCallback

from benchmarks.paper import language, run
from benchmarks.paper.__main__ import main
from benchmarks.paper.answers import Answers
from qsvft.training.checkpoints import last_whole

NAME, METHODS = "table-1-gemma-2b", ("SVFT plain", "LoRA r=1", "Full fine-tuning")
OF_EACH_KIND = [
    *((NAME, method) for method in METHODS),
    ("table-3-rte", "qsvft"),
    ("table-4-cifar100-vit-b", "LoRA r=8"),
    ("table-4-cifar100-vit-b", "Head alone"),
]


class Cut(TrainerCallback):
    """What ends a process at the end of a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture
def four_steps(told, tmp_path):
    def of(method, folder, *more, name=NAME):
        (tmp_path / folder).mkdir(exist_ok=True)
        return told(name, method, tmp_path / folder, "max_steps=4", "save_steps=1", "save_total_limit=4", *more)

    return of


def outcome(folder, method):
    """The folder of a run, its row, and what was trained."""
    (place,) = (folder / "out").glob("*/*/seed-0")
    rows = json.loads((place.parents[1] / "results.json").read_text())
    (weights,) = (place / "model").glob("*.safetensors")
    assert [row["method"] for row in rows] == [method]
    return place, rows[0], load_file(weights)


@pytest.mark.parametrize(("name", "method"), OF_EACH_KIND)
def test_cut_off_in_training_it_goes_on_and_ends_alike(four_steps, name, method, tmp_path, monkeypatch, capsys):
    assert main(four_steps(method, "whole", name=name)) == 0
    monkeypatch.setattr(run, "shown", lambda say: Cut())
    with pytest.raises(SystemExit) as ended:
        main(four_steps(method, "cut", name=name))
    assert ended.value.code == 130
    (place,) = (tmp_path / "cut" / "out").glob("*/*/seed-0")
    reached = last_whole(place / "checkpoints")
    assert reached is not None and f"The last whole checkpoint is {reached}" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(four_steps(method, "cut", name=name)) == 0
    said = capsys.readouterr().out
    assert f"goes on from {reached}" in said and "step 4 of 4" in said and "step 2 of 4" not in said
    whole, cut = outcome(tmp_path / "whole", method), outcome(tmp_path / "cut", method)
    assert same_tensors(whole[2], cut[2]) and whole[1]["scores"] == cut[1]["scores"] and cut[1]["steps"] == 4
    assert not (cut[0] / "checkpoints").exists()


@pytest.mark.parametrize("method", METHODS)
def test_cut_off_in_asking_it_asks_only_what_is_left(four_steps, method, tmp_path, monkeypatch, capsys):
    assert main(four_steps(method, "whole")) == 0
    own, asked = language.Language._written, []

    def written(self, model, prompts, data):
        if len(asked) == 2:
            raise OSError(28, "No space left on device")
        asked.extend(prompts)
        return own(self, model, prompts, data)

    monkeypatch.setattr(language.Language, "_written", written)
    assert main(four_steps(method, "cut")) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "What is trained and what is answered is kept" in said
    assert len(said.strip().splitlines()) == 1
    monkeypatch.setattr(run.OneRun, "_train", None)  # it is not trained again
    monkeypatch.setattr(language.Language, "_written", lambda *given: (asked.extend(given[2]), own(*given))[1])
    assert main(four_steps(method, "cut")) == 0
    assert len(asked) == 6 and len(set(asked)) == 6  # three questions of each set
    whole, cut = outcome(tmp_path / "whole", method), outcome(tmp_path / "cut", method)
    assert whole[1]["scores"] == cut[1]["scores"]
    for name in ("GSM8K", "MATH"):
        assert Answers(whole[0] / f"{name}.jsonl", name, 3).all() == Answers(cut[0] / f"{name}.jsonl", name, 3).all()


def test_what_is_done_is_not_done_again_and_its_table_is_shown(four_steps, tmp_path, monkeypatch, capsys):
    command = four_steps("SVFT plain", "whole")
    assert main(command) == 0
    monkeypatch.setattr(run.OneRun, "go", None)
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "SVFT plain" in said and "not run" not in said and "predicted" not in said


def test_results_of_other_methods_and_seeds_stay_beside_new_ones(told, tmp_path):
    for method, seed in (("SVFT plain", "0"), ("LoRA r=1", "0"), ("LoRA r=1", "1")):
        command = told(NAME, method, tmp_path)
        command[command.index("--seeds") + 1] = seed
        assert main(command) == 0
    rows = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert [(row["method"], row["seed"]) for row in rows] == [("SVFT plain", 0), ("LoRA r=1", 0), ("LoRA r=1", 1)]
    assert all(row["asked"] == {"GSM8K": 3, "MATH": 3} for row in rows)


def test_a_folder_of_a_run_with_other_settings_is_refused_and_left_as_it_is(four_steps, tmp_path, capsys):
    assert main(four_steps("SVFT plain", "whole")) == 0
    _, row, _ = outcome(tmp_path / "whole", "SVFT plain")
    scores = next((tmp_path / "whole").rglob("scores.json"))
    scores.unlink()
    assert main(four_steps("SVFT plain", "whole", "weight_decay=0.5")) == 2
    said = capsys.readouterr().err
    assert re.search(r"found a run with another training .*expected the same", said)
    assert not scores.exists() and outcome(tmp_path / "whole", "SVFT plain")[1] == row


def test_a_loss_of_nan_ends_one_run_in_one_line_and_the_next_goes_on(told, tmp_path, monkeypatch, capsys):
    own = run.make

    def broken(method, *given):
        model = own(method, *given)
        if method.name == "LoRA r=1":
            next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(run, "make", broken)
    command = told(NAME, "LoRA r=1", tmp_path)
    command[command.index("LoRA r=1")] = "SVFT plain"
    command.insert(command.index("SVFT plain"), "LoRA r=1")
    assert main(command) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: LoRA r=1: ") and "NaN or Inf; expected finite numbers" in line
    assert [row["method"] for row in json.loads(next(tmp_path.rglob("results.json")).read_text())] == ["SVFT plain"]


def test_half_a_line_of_answers_is_no_answer_and_the_next_one_is_whole(tmp_path):
    answers = Answers(tmp_path / "a.jsonl", "a", 3)
    answers.add({0: {"written": "x"}, 2: {"written": "é\n"}})
    with open(answers.path, "ab") as file:
        file.write(b'{"question": 1, "wri')
    assert answers.left() == [1]
    answers.add({1: {"written": "y"}})
    assert answers.left() == [] and answers.all()[1] == {"written": "y"} and answers.all()[2] == {"written": "é\n"}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((NAME, method) for method in ("qsvft", "QLoRA r=16", "VeRA r=1024", "Full fine-tuning")),
        *(("table-3-rte", method) for method in ("qsvft", "QLoRA r=16", "SVFT plain", "Full fine-tuning")),
        *(("table-4-cifar100-vit-b", method) for method in ("qsvft", "QLoRA r=16", "SVFT plain", "Head alone")),
    ],
)
def test_what_was_saved_answers_as_what_was_trained(four_steps, name, method, tmp_path, monkeypatch):
    command = four_steps(method, "whole", "learning_rate=0.02", name=name)
    assert main(command) == 0
    place, row, _ = outcome(tmp_path / "whole", method)
    answers = {path: path.read_text() for path in place.glob("*.jsonl")}
    for path in (place / "scores.json", *answers):
        path.unlink()
    monkeypatch.setattr(run.OneRun, "_train", None)
    assert main(command) == 0
    assert outcome(tmp_path / "whole", method)[1] == row
    assert {path: path.read_text() for path in place.glob("*.jsonl")} == answers
