"""The benchmarks' scripts run, at toy size, and say what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A folder with two weights under the names that a BERT checkpoint has."""
    folder = tmp_path_factory.mktemp("bert")
    weights = {
        f"encoder.layer.0.{name}.weight": torch.randn(*shape) for name, shape in (("a", (24, 16)), ("b", (16, 24)))
    }
    save_file({**weights, "pooler.dense.weight": torch.randn(8, 8)}, folder / "model.safetensors")
    return folder


def run(script: str, tmp_path: Path, *arguments: str) -> tuple[str, dict]:
    path = tmp_path / "figures.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(path.read_text())


def test_forms(tmp_path):
    shown, figures = run("forms.py", tmp_path, "--size", "64", "--tokens", "32")
    errors = {row["form"]: row["gradient"] for row in figures["rows"]}
    assert errors["two-sided"] < errors["one-sided, 1/s unbounded"] and "two-sided" in shown


def test_factor_bits(tmp_path, bert):
    _, figures = run("factor_bits.py", tmp_path, "--size", "64", "--minilm", str(bert))
    for rows in figures["tables"].values():
        error = {name: row[1] for name, row in rows.items()}
        assert error["bf16"] < error["int8, linear (held so)"] < error["int8, bitsandbytes' dynamic map"]
    assert len(figures["tables"]) == 2


@pytest.mark.slow
def test_residual(tmp_path, bert):
    _, figures = run("residual.py", tmp_path, "--size", "64", "--texts", "8", "--minilm", str(bert))
    for rows in figures["errors"].values():
        assert rows["1 of the rank, int8"] < rows["0.25 of the rank, int8"] < rows["NF4 alone"]
    assert figures["losses"].keys() == {"bf16", *figures["errors"]["MiniLM"]}


def test_decomposition(tmp_path):
    sizes = ("--small", "64", "--width", "640", "--inner", "672", "--rank", "64", "--layers", "2")
    shown, figures = run("decomposition.py", tmp_path, *sizes)
    of_square = {row["way"]: row for row in figures["rows"] if row["matrix"] == "width x width"}
    exact, truncated = of_square["exact, one side"], of_square["exact, both sides, truncated"]
    randomized = of_square["randomized, one side"]
    assert exact["error"] < 1e-9 and exact["orthogonality"] < 1e-12
    assert truncated["error_over_least"] < 1 + 1e-9 < randomized["error_over_least"] < 1.1
    assert {row["way"] for row in figures["model_minutes"]} == of_square.keys()
    energy = {row["spectrum"]: row["energy"] for row in figures["energies"]}
    assert 0.9 < energy["flat (Marchenko-Pastur)"] < energy["j^-1.0"] < 1 + 1e-9 and "randomized" in shown


def test_export(tmp_path):
    sizes = ("--width", "128", "--layers", "1", "2", "--rank", "8")
    shown, figures = run("export.py", tmp_path, str(tmp_path / "models"), *sizes)
    errors = {row["format"]: row["error"] for row in figures["rows"]}
    assert all(row["before"] <= row["anonymous"] for row in figures["rows"])
    assert 0 < errors["lora"] < 5e-3 < errors["dense"]
    assert "predicted for 32 of them" in shown


@pytest.mark.slow
def test_streaming(tmp_path):
    sizes = ("--width", "128", "--layers", "1", "2", "--factor-bits", "4")
    shown, figures = run("streaming.py", tmp_path, str(tmp_path / "models"), *sizes)
    few, many = figures["rows"]
    assert many["source"] > few["source"] and many["written"] > few["written"]
    assert all(row["before"] <= row["anonymous"] and row["loaded"]["held"] > 0 for row in figures["rows"])
    assert "minutes for 32 of them" in shown
