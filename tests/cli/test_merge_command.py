"""qsvft merge: an adapter and its base become a dense checkpoint, with the factors that it was trained with."""

import json

import pytest
import torch
from small_models import load, logits, randomize
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qsvft
from qsvft.cli.main import app
from qsvft.maths import decomposition


def run(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """A prepared directory, an adapter trained on it, and the logits of the two merged."""
    folder = tmp_path_factory.mktemp("trained")
    qsvft.prepare_checkpoint(llama, folder / "prepared", progress=False)
    model = randomize(qsvft.from_pretrained(folder / "prepared", progress=False))
    model.save_pretrained(folder / "adapter")
    return folder / "prepared", folder / "adapter", logits(model.merge_and_unload())


def test_merged_is_dense_and_agrees(trained, llama, tmp_path):
    _, adapter, expected = trained
    result = run(adapter, tmp_path / "merged", "--device-map", "cpu")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), expected)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_another_base_that_is_the_same_checkpoint(trained, llama, tmp_path):
    _, adapter, expected = trained
    assert run(adapter, tmp_path / "merged", "--base", llama).exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_factors_that_come_out_otherwise_need_those_that_were_trained_with(trained, llama, tmp_path, monkeypatch):
    prepared, adapter, expected = trained
    signs = decomposition._signs
    monkeypatch.setattr(decomposition, "_signs", lambda vectors: -signs(vectors) * signs(vectors.flip(0)))
    refused = run(adapter, tmp_path / "merged", "--base", llama)
    assert refused.exit_code == 2
    assert "--factors" in refused.output
    assert list((tmp_path / "merged").iterdir()) == []
    assert run(adapter, tmp_path / "merged", "--base", llama, "--factors", prepared).exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_a_self_contained_adapter_needs_nothing_else(llama, tmp_path, monkeypatch):
    model = randomize(qsvft.prepare(load(llama, torch.float32), progress=False))
    model.save_pretrained(tmp_path / "adapter", include_factors=True)
    expected = logits(model.merge_and_unload())
    signs = decomposition._signs
    monkeypatch.setattr(decomposition, "_signs", lambda vectors: -signs(vectors) * signs(vectors.flip(0)))
    assert run(tmp_path / "adapter", tmp_path / "merged", "--base", llama).exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_what_stands_there_is_not_touched(trained, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = run(trained[1], tmp_path)
    assert result.exit_code == 2
    assert "holds something already ('thesis.txt')" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
