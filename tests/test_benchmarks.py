"""The benchmarks' scripts run, at toy size, and say what they measured."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from script_modules import BENCHMARKS, EXAMPLES, script_modules


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A folder with two weights under the names that a BERT checkpoint has."""
    folder = tmp_path_factory.mktemp("bert")
    weights = {
        f"encoder.layer.0.{name}.weight": torch.randn(*shape) for name, shape in (("a", (24, 16)), ("b", (16, 24)))
    }
    save_file({**weights, "pooler.dense.weight": torch.randn(8, 8)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script in this process, as a fresh one would find it; gives what it shows and its figures."""

    def run_it(script: str, *arguments: str) -> tuple[str, dict]:
        path, module = tmp_path / "figures.json", import_module(script)
        if hasattr(module, "in_a_process"):
            monkeypatch.setattr(module, "in_a_process", lambda _, side, *words: getattr(module, side)(*words))
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--json", str(path)])
        module.main()
        return capsys.readouterr().out, json.loads(path.read_text())

    with script_modules(BENCHMARKS, EXAMPLES):
        yield run_it


def test_forms(run):
    shown, figures = run("forms", "--size", "64", "--tokens", "32")
    errors = {row["form"]: row["gradient"] for row in figures["rows"]}
    assert errors["two-sided"] < errors["one-sided, 1/s unbounded"] and "two-sided" in shown


def test_factor_bits(run, bert):
    _, figures = run("factor_bits", "--size", "64", "--minilm", str(bert))
    for rows in figures["tables"].values():
        error = {name: row[1] for name, row in rows.items()}
        assert error["bf16"] < error["int8, linear (held so)"] < error["int8, bitsandbytes' dynamic map"]
    assert len(figures["tables"]) == 2


def test_residual(run, bert, monkeypatch):
    monkeypatch.setattr("pretrain.docstrings", lambda: [json.__doc__])  # all of the library's take ten seconds to read
    _, figures = run("residual", "--size", "64", "--texts", "8", "--minilm", str(bert))
    for rows in figures["errors"].values():
        assert rows["1 of the rank, int8"] < rows["0.25 of the rank, int8"] < rows["NF4 alone"]
    assert figures["losses"].keys() == {"bf16", *figures["errors"]["MiniLM"]}


def test_decomposition(run):
    sizes = ("--small", "64", "--width", "640", "--inner", "672", "--rank", "64", "--layers", "2")
    shown, figures = run("decomposition", *sizes)
    of_square = {row["way"]: row for row in figures["rows"] if row["matrix"] == "width x width"}
    exact, truncated = of_square["exact, one side"], of_square["exact, both sides, truncated"]
    randomized = of_square["randomized, one side"]
    assert exact["error"] < 1e-9 and exact["orthogonality"] < 1e-12
    assert truncated["error_over_least"] < 1 + 1e-9 < randomized["error_over_least"] < 1.1
    assert {row["way"] for row in figures["model_minutes"]} == of_square.keys()
    energy = {row["spectrum"]: row["energy"] for row in figures["energies"]}
    assert 0.9 < energy["flat (Marchenko-Pastur)"] < energy["j^-1.0"] < 1 + 1e-9 and "randomized" in shown


def test_export(run, tmp_path):
    sizes = ("--width", "128", "--layers", "1", "2", "--rank", "8")
    shown, figures = run("export", str(tmp_path / "models"), *sizes)
    errors = {row["format"]: row["error"] for row in figures["rows"]}
    assert all(row["before"] <= row["anonymous"] for row in figures["rows"])
    assert 0 < errors["lora"] < 5e-3 < errors["dense"]
    assert "predicted for 32 of them" in shown


def test_streaming(run, tmp_path):
    sizes = ("--width", "128", "--layers", "1", "2", "--factor-bits", "4")
    shown, figures = run("streaming", str(tmp_path / "models"), *sizes)
    few, many = figures["rows"]
    assert many["source"] > few["source"] and many["written"] > few["written"]
    assert all(row["before"] <= row["anonymous"] and row["loaded"]["held"] > 0 for row in figures["rows"])
    assert "minutes for 32 of them" in shown


def test_the_other_side_of_a_script_answers_from_a_process_of_its_own(run, tmp_path):
    streaming = import_module("streaming")
    streaming.make_checkpoint(tmp_path / "llama", 1, 64)
    found = streaming.in_a_process(
        streaming.__file__, "prepare", str(tmp_path / "llama"), str(tmp_path / "it"), "{}", "1"
    )
    assert found["units"] == 8 and 0 < found["before"] <= found["anonymous"]
    assert (tmp_path / "it" / "config.json").is_file()
