"""What cannot be run is said in one line, before anything is written."""

import json
import re
import sys

import pytest
import yaml
from huggingface_hub.errors import GatedRepoError
from transformers import AutoImageProcessor, AutoTokenizer

from benchmarks.paper.__main__ import main
from benchmarks.paper.experiment import merged, names, read_experiment
from benchmarks.paper.run import LOCK
from qsvft.storage.only_process import only_process

NAME = "table-1-gemma-2b"
MINIMAL = {
    "about": "a test", "kind": "language", "model": "m",
    "train": {"dataset": "d"}, "asked": {"A": {"dataset": "d", "score": "gsm8k"}}, "methods": {"F": {"way": "full"}},
}  # fmt: skip


def refused(command, capsys):
    """The line that a command ends with."""
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "videos"}, "kind: found 'videos'; expected language, sentences, images"),
        ({"about": None}, "found no about; expected about, kind, model"),
        ({"modle": "x"}, "modle: there is no such field; expected name, about.* Did you mean model?"),
        ({"train": {"dataset": 3}}, "train: dataset: found 3; expected a text"),
        ({"train": ["d"]}, r"train: found \['d'\]; expected a table"),
        ({"asked": {"A": {"dataset": "d", "first": True}}}, "asked: A: first: found True; expected a whole number"),
        ({"asked": {"A": {"score": "gsm8k"}}}, "asked: A: found no dataset; expected it"),
        ({"methods": {"F": {"way": "full", "bits": 5}}}, "methods: F: bits: found 5; expected 16, 8 or 4"),
        ({"methods": {"F": {"way": "LORA", "calibration": 2}}}, "methods: F: calibration: only QSVFT has it"),
        ({"methods": {"F": {"way": "full", "options": 1}}}, "methods: F: options: found 1; expected a table"),
    ],
)
def test_a_file_with_a_fault_names_the_field_and_what_was_expected(tmp_path, change, said):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in {**MINIMAL, **change}.items() if value is not None}))
    with pytest.raises(ValueError, match=f"^{path}: .*{said}" if "about" in change else said) as error:
        read_experiment(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- a", "\x00"])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mine.yaml: .*expected a YAML table"):
        read_experiment(str(tmp_path / "mine.yaml"))


def test_files_that_begin_with_each_other_are_refused(tmp_path):
    for one, other in ("ab", "ba"):
        (tmp_path / f"{one}.yaml").write_text(f"like: {other}\n")
    with pytest.raises(ValueError, match="like: a goes round in a circle"):
        read_experiment(str(tmp_path / "a.yaml"))


def test_a_table_over_another_replaces_adds_and_takes_away():
    below = {"a": {"b": 1, "c": 2}, "d": [1], "e": 3}
    assert merged(below, {"a": {"b": None, "f": 4}, "d": [2], "e": None}) == {"a": {"c": 2, "f": 4}, "d": [2]}
    assert below == {"a": {"b": 1, "c": 2}, "d": [1], "e": 3}


def test_an_unknown_experiment_names_the_nearest(capsys):
    line = refused(["table-1-gema-2b"], capsys)
    assert "there is no such experiment" in line and line.endswith("Did you mean table-1-gemma-2b?")


def test_every_experiment_is_listed_with_what_it_is(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names() and all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--methods", "LoRA r=33"], "--methods: found 'LoRA r=33'; expected some of .* Did you mean 'LoRA r=32'?"),
        (["--data", "train=nowhere.jsonl"], "--data train=nowhere.jsonl: there is no such file or directory"),
        (["--data", "ARC=nowhere.jsonl"], "found 'ARC'; expected train or one of GSM8K, MATH"),
        (["--data", "train"], "--data train: expected NAME=VALUE"),
        (["--rows", "0"], "--rows, --ask: found 0; expected at least 1"),
        (["--set", "learnign_rate=1"], "learnign_rate: is no option .*Did you mean learning_rate?"),
        (["--set", "warmup_steps=often"], "warmup_steps"),
    ],
)
def test_a_command_with_a_fault_is_refused_in_one_line(told, tmp_path, given, said, capsys):
    command = told(NAME, "SVFT plain", tmp_path)
    if given[0] == "--set":
        command += given[1:]
    else:
        command += given
    line = refused(command, capsys)

    assert re.search(said.replace("?", r"\?"), line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "method", "reads"),
    [
        (NAME, "SVFT plain", AutoTokenizer),
        ("table-3-rte", "LoRA r=8", AutoTokenizer),
        ("table-4-food101-vit-b", "LoRA r=8", AutoImageProcessor),
    ],
)
def test_a_model_behind_a_gate_is_named_in_one_line(told, tmp_path, name, method, reads, monkeypatch, capsys):
    def gated(model, *given, **options):
        raise OSError(f"You are trying to access a gated repo.\nMake sure to have access to it at {model}.") from (
            GatedRepoError.__new__(GatedRepoError)
        )

    command = told(name, method, tmp_path)
    monkeypatch.setattr(reads, "from_pretrained", gated)
    line = refused(command, capsys)
    assert "You are trying to access a gated repo." in line and str(command[command.index("--model") + 1]) in line


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the file is empty; expected rows of the split 'train'"),
        ([{"a": "b"}], "query"),
        ([{"query": "q", "response": ""}], "row 0: found completion=''; expected a text"),
    ],
)
def test_rows_that_teach_nothing_are_refused_with_their_data_set(told, tmp_path, rows, said, capsys):
    command = told(NAME, "SVFT plain", tmp_path)
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = next(number for number, text in enumerate(command) if text.startswith("train="))
    command[place] = f"train={path}"
    line = refused(command, capsys)
    assert line.startswith("train: ") and said in line


def test_rows_whose_answers_lie_beyond_the_longest_sequence_are_refused(told, tmp_path, capsys):
    line = refused([*told(NAME, "SVFT plain", tmp_path), "max_length=16"], capsys)
    assert "reaches its answer within max_length=16" in line


def test_a_column_that_is_not_there_is_named(told, tmp_path, capsys):
    command = told("table-3-rte", "LoRA r=8", tmp_path)
    place = next(number for number, text in enumerate(command) if text.startswith("train="))
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a", "label": 1}\n')
    command[place] = f"train={path}"
    assert "columns: found no sentence1" in refused(command, capsys)


def test_a_label_that_was_not_trained_on_is_named(told, tmp_path, capsys):
    command = told("table-3-rte", "LoRA r=8", tmp_path)
    place = next(number for number, text in enumerate(command) if text.startswith("RTE="))
    path = tmp_path / "mine.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "label": 7}\n')
    command[place] = f"RTE={path}"
    assert "found the label 7; expected one of those trained on, [0, 1]" in refused(command, capsys)


def test_without_the_libraries_that_judge_its_answers_nothing_is_trained(told, tmp_path, monkeypatch, capsys):
    command = told("table-3-rte", "LoRA r=8", tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert "pip install 'qsvft[paper]'" in refused(command, capsys)
    assert not (tmp_path / "out").exists()


def test_a_run_that_another_process_has_in_hand_is_left_to_it_and_the_next_one_is_made(told, tmp_path, capsys):
    command = told(NAME, "SVFT plain", tmp_path, "max_steps=1")
    command.insert(command.index("SVFT plain") + 1, "LoRA r=1")
    theirs = tmp_path / "out" / NAME / read_experiment(NAME).methods["SVFT plain"].folder / "seed-0"
    theirs.mkdir(parents=True)
    with only_process(theirs / LOCK, "training", "--output"):
        assert main(command) == 1
    assert "SVFT plain: " in (said := capsys.readouterr().err) and "another process is training" in said
    assert list(theirs.iterdir()) == []
    rows = json.loads((theirs.parents[1] / "results.json").read_text())
    assert [row["method"] for row in rows] == ["LoRA r=1"]
