"""What a run of the paper's experiments takes is said before it starts; what does not fit is refused with what does."""

import re
import shutil
from collections import namedtuple

import pytest

import qsvft
from benchmarks.paper import forecast as module
from benchmarks.paper.__main__ import chosen, main, options
from benchmarks.paper.experiment import read_experiment
from benchmarks.paper.forecast import forecast, smaller, without_values
from benchmarks.paper.run import OneRun
from benchmarks.paper.shapes import shape_of
from benchmarks.paper.ways import config_of
from qsvft.memory.cards import GIB, needed_bytes
from qsvft.memory.methods import Method
from qsvft.memory.presets import model_config
from qsvft.memory.shapes import model_without_values
from qsvft.memory.step import count_on


def first_run(command):
    told = options(command)
    experiment = chosen(told.experiments[0], told)
    (method,) = experiment.methods.values()
    return OneRun(experiment, method, 0, told.output, told.batch_size, print)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("table-1-gemma-2b", "SVFT plain"),
        ("table-3-rte", "qsvft"),
        ("table-3-rte", "QLoRA r=16"),
        ("table-4-food101-vit-b", "qsvft"),
    ],
)
def test_a_dry_run_says_what_it_takes_and_writes_nothing(told, tmp_path, capsys, name, method):
    assert main([*told(name, method, tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"[\d.]+ GiB predicted, this machine has [\d.]+; 2 steps in roughly .*, asking at most .*; "
        r"up to [\d.]+ GiB of disk, [\d.]+ free",
        said,
    )
    assert not (tmp_path / "out").exists()


def test_more_at_once_takes_more_and_more_questions_take_longer(told, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "seconds_of", lambda weights, tokens, checkpointing: float(weights * tokens))
    monkeypatch.setattr(module, "_bytes_a_second", lambda: 1e30)
    command = told("table-1-gemma-2b", "LoRA r=32", tmp_path)
    few = forecast(first_run(command))
    wide = forecast(first_run([*command, "per_device_train_batch_size=4"]))
    assert wide.peak_bytes > few.peak_bytes and wide.seconds == 2 * few.seconds
    command[command.index("--ask") + 1] = "6"
    assert forecast(first_run(command)).asking_seconds == 2 * few.asking_seconds


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("LoRA r=32", None),
        ("qsvft", "qsvft:basis=data,residual=true"),
        ("SVFT plain", "qsvft:bits=16,pattern=plain,sides=both,factor_bits=16,rank=full"),
    ],
)
def test_the_predicted_peak_is_the_profilers(name, counted):
    """On two layers of Gemma-2B, 4 sequences of 512 tokens."""
    method = read_experiment("table-1-gemma-2b").methods[name]
    config = model_config("gemma-2b")
    config.num_hidden_layers = 2
    base = model_without_values(config)
    model = without_values(method, base, "CAUSAL_LM")
    ledger, trained = count_on(model, base, base.get_output_embeddings(), 4, 512, False, "adamw")
    of_pefts = Method.of(name, config_of(method, "CAUSAL_LM"))
    (row,) = qsvft.profile(config, [counted or of_pefts], 4, 512, False).rows
    assert ledger.peaks()["total"].nbytes == row.peak_bytes and trained == row.trainable_parameters


def test_without_the_hub_the_shapes_of_the_file_are_taken():
    assert shape_of(read_experiment("table-1-gemma-2b")).hidden_size == 2048
    assert shape_of(read_experiment("table-3-rte")).num_hidden_layers == 12


def test_smaller_settings_make_the_same_step_and_end_with_4_bits():
    experiment = read_experiment("table-1-gemma-2b")
    found = list(smaller(experiment, experiment.methods["LoRA r=32"]))
    for _, other, method in found:
        training = {**other.training, **method.training}
        assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 64
    assert found[0][0] == "--set gradient_checkpointing=true"
    words, _, last = found[-1]
    assert words.endswith("per_device_train_batch_size=1 gradient_accumulation_steps=64 --bits 4") and last.bits == 4
    assert all(method.bits == 16 for *_, method in smaller(experiment, experiment.methods["Full fine-tuning"]))


def test_a_step_over_the_cards_memory_is_refused_with_the_setting_that_fits(told, tmp_path, monkeypatch, capsys):
    command = told("table-1-gemma-2b", "LoRA r=32", tmp_path, "per_device_train_batch_size=4")
    run = first_run(command)
    whole = forecast(run).peak_bytes
    less = [forecast(first_run([*command, *extra])).peak_bytes for extra in (
        ["gradient_checkpointing=true"], ["gradient_checkpointing=true", "per_device_train_batch_size=2"],
    )]  # fmt: skip
    assert whole >= less[0] > less[1]
    monkeypatch.setattr(module, "present_card", lambda: needed_bytes(less[1]))
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    words = "--set gradient_checkpointing=true per_device_train_batch_size=2 gradient_accumulation_steps=2 fits"
    assert f"a step is predicted to need {needed_bytes(whole) / GIB:.2f} GiB" in line and words in line
    monkeypatch.setattr(module, "present_card", lambda: 1)
    assert main(command) == 2
    assert "No smaller setting of it fits; leave the method out by --methods." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10, 10, 0))
    assert main(told("table-1-gemma-2b", "LoRA r=32", tmp_path)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(
        r"found 0.00 GiB free on the disk of .*; expected [\d.]+\. Give another --output, or make room", line
    )
    assert not (tmp_path / "out").exists()
