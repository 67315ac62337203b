"""``qsvft profile``: what it prints and writes, and one line on stderr for every bad input."""

import csv
import json
import os

import pytest
from transformers import T5Config
from typer.testing import CliRunner

import qsvft
from qsvft.cli.main import app
from qsvft.memory import DEFAULT_METHODS


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def profile(*arguments):
    return run("profile", "tiny", "--seq-len", 32, *arguments)


def test_the_command_line_reports_what_the_library_does(tmp_path):
    path = tmp_path / "report.json"
    chosen = ("--method", "svft", "--method", "lora:4", "--batch-size", 2, "--no-checkpointing")
    result = profile(*chosen, "--optimizer", "sgd", "--card", 10, "--card", 6, "--json", path)
    assert result.exit_code == 0, result.stderr
    expected = qsvft.profile("tiny", ["svft", "lora:4"], 2, 32, False, "sgd", cards=(6, 10))
    assert json.loads(path.read_text()) == expected.to_dict()


def test_the_default_methods_are_shown_and_every_file_is_written(tmp_path):
    names = {"--json": "r.json", "--csv": "r.csv", "--plot": "bars.png", "--timeline": "step.png"}
    files = [part for flag, name in names.items() for part in (flag, tmp_path / name)]
    result = profile(*files)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert all(f"\n {method} " in result.stdout for method in DEFAULT_METHODS)
    assert sorted(os.listdir(tmp_path)) == sorted(names.values())
    with open(tmp_path / "r.csv", newline="") as file:
        assert [line["method"] for line in csv.DictReader(file)] == list(DEFAULT_METHODS)


def test_the_longest_sequence_is_shown(tmp_path):
    result = profile("--method", "floor", "--max-seq-len", 0.752, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    [row] = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["max_seq_len"] % 128 == 0
    assert f" {row['max_seq_len']:,} " in result.stdout
    assert "256 as its longest sequence" in result.stdout


def test_measuring_shows_prediction_and_step_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("qsvft.memory.measured.present_device", lambda: "cpu")
    result = profile("--method", "svft", "--method", "lora", "--measure", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    assert "Predicted and measured on cpu" in result.stdout
    for row in json.loads((tmp_path / "r.json").read_text())["rows"]:
        assert row["measured"]["peak_bytes"] == row["peak_bytes"]
        assert row["measured"]["difference_bytes"] == 0


def test_a_method_that_cannot_run_leaves_the_others():
    result = profile("--method", "qsvft:999", "--method", "floor")
    assert result.exit_code == 0
    assert "qsvft:999 could not run: ValueError:" in result.stdout
    assert "\n floor " in result.stdout


def test_the_exit_code_says_when_no_method_could_run():
    result = profile("--method", "qsvft:999")
    assert result.exit_code == 1
    assert result.stderr == "qsvft: none of the methods could run\n"


def test_one_card_gets_its_settings_after_the_tables(tmp_path):
    path = tmp_path / "r.json"
    settings = ("--method", "floor", "--batch-size", 2, "--optimizer", "sgd", "--card", 8, "--json", path)
    result = profile(*settings)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = qsvft.recommend("tiny", 8, 32, 2, optimizer="sgd")
    assert result.stdout.endswith(f"\n\n{found}\n")
    assert json.loads(path.read_text())["recommendation"] == found.to_dict()
    assert "Live at the peak" in result.stdout
    kept = profile(*settings, "--no-checkpointing")
    assert "as given: gradient_checkpointing=False" in kept.stdout


@pytest.mark.parametrize("cards", [(), (8, 12)])
def test_no_settings_are_shown_for_no_card_or_several(tmp_path, cards):
    path = tmp_path / "r.json"
    result = profile("--method", "floor", "--json", path, *(part for card in cards for part in ("--card", card)))
    assert result.exit_code == 0, result.stderr
    assert "qsvft.prepare" not in result.stdout
    assert "recommendation" not in json.loads(path.read_text())


def test_a_card_that_nothing_fits_is_told_what_would():
    result = profile("--method", "floor", "--card", 0.7501)
    assert result.exit_code == 0, result.stderr
    assert "nothing fits" in result.stdout and "what would fit: a card of 0.8 GiB" in result.stdout


def test_the_tables_stand_where_no_settings_can_be_counted(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("'tiny': a step of qsvft cannot be counted")

    monkeypatch.setattr("qsvft.memory.recommend", refuse)
    result = profile("--method", "floor", "--card", 8)
    assert result.exit_code == 0
    assert "\n floor " in result.stdout
    assert result.stderr == "qsvft: no recommendation: 'tiny': a step of qsvft cannot be counted\n"


def refused(result, *names):
    """Exit code 2, nothing on stdout, and one line on stderr that names the thing."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    for name in names:
        assert name in result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "nope"], "'nope'"),
        (["--method", ""], "unknown method"),
        (["--method", "lora:0"], "'lora:0'"),
        (["--method", "lora:many"], "'lora:many'"),
        (["--method", "floor:3"], "'floor:3'"),
        (["--method", "qsvft:depth=3"], "'depth'"),
        (["--method", "qsvft:pattern=zebra"], "'zebra'"),
        (["--method", "qsvft:bits=5"], "bits=5"),
        (["--seq-len", "0"], "seq_len"),
        (["--seq-len", "-4"], "seq_len"),
        (["--seq-len", "long"], "--seq-len"),
        (["--batch-size", "0"], "batch_size"),
        (["--optimizer", "lion"], "'lion'"),
        (["--card", "0"], "card"),
        (["--card", "-8"], "card"),
        (["--card", "nan"], "card"),
        (["--max-seq-len", "0"], "longest sequence"),
        (["--json", "missing/r.json"], "missing/r.json"),
        (["--csv", "."], "'.'"),
        (["--plot", "bars.gif"], "bars.gif"),
        (["--plot", "missing/bars.png"], "missing/bars.png"),
        (["--timeline", "/dev/null"], "/dev/null"),
        (["--json", "same", "--csv", "./same"], "same"),
        (["--bogus"], "--bogus"),
        (["extra"], "extra"),
    ],
)
def test_bad_input_takes_one_line_and_exit_code_2(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run("profile", "tiny", *arguments), named)
    assert os.listdir(tmp_path) == []


def test_an_unknown_model_is_named():
    refused(run("profile", "no/such-model"), "'no/such-model'", "llama-3-8b")


def test_a_missing_model_and_an_unknown_command_are_usage_errors():
    refused(run("profile"), "Missing argument")
    refused(run("profyle"), "profyle")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model_type": "llama", "hidden_size": "wide"}', '{"model_type": 3}', "\x00\xff"]
)
def test_a_directory_with_a_broken_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    refused(run("profile", tmp_path), str(tmp_path))


def test_an_architecture_without_a_causal_loss_is_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    refused(run("profile", tmp_path), "T5Config")


def test_a_model_too_large_to_measure_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("qsvft.memory.measured.free_bytes", lambda device: 1000)
    refused(profile("--measure"), "'tiny'")


def test_a_file_that_turns_unwritable_is_one_line_too(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    result = profile("--method", "floor", "--json", tmp_path / "r.json")
    assert result.exit_code == 2
    assert result.stderr == "qsvft: disk full\n"
    assert os.listdir(tmp_path) == []


def test_help_and_version_are_shown():
    assert "profile" in run().stdout
    assert "--max-seq-len" in run("profile", "--help").stdout
    assert run("--version").stdout.strip() == f"qsvft {qsvft.__version__}"
