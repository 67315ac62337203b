"""qsvft merge: an adapter and its base become a dense checkpoint, with the factors that it was trained with."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import load, logits, randomize
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qsvft
from qsvft.cli.main import app
from qsvft.maths import decomposition
from qsvft.storage.whole_folders import SAVING

META = {"format": "pt"}


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


def lacking_its_head(llama, folder):
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, folder / "model.safetensors", META)
    return folder


def test_a_base_without_its_head_is_refused_and_none_is_made_up(trained, llama, tmp_path):
    base = lacking_its_head(llama, tmp_path / "base")
    result = run(trained[1], tmp_path / "merged", "--base", base)
    assert result.exit_code == 2, result.output
    assert "lacks 1 tensors of LlamaForCausalLM, such as lm_head.weight" in " ".join(result.output.split())
    assert list((tmp_path / "merged").iterdir()) == []


def test_a_head_that_the_adapter_brings_may_be_missing(llama, tmp_path):
    base = lacking_its_head(llama, tmp_path / "base")
    model = randomize(qsvft.prepare(load(llama), modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    assert run(tmp_path / "adapter", tmp_path / "merged", "--base", base).exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(model.merge_and_unload()))


def test_nan_in_M_is_refused(llama, tmp_path):
    model = randomize(qsvft.prepare(load(llama)))
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "qsvft_M" in name)[0] = torch.nan
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", META)
    result = run(tmp_path / "adapter", tmp_path / "merged", "--base", llama)
    assert result.exit_code == 2 and "holds 1 NaN or Inf values" in " ".join(result.output.split())


def test_what_a_killed_merge_left_is_not_taken_over(trained, tmp_path):
    (tmp_path / "merged" / SAVING).mkdir(parents=True)
    (tmp_path / "merged" / SAVING / "tokenizer.json").write_text("{}")
    assert run(trained[1], tmp_path / "merged").exit_code == 0
    expected = (trained[0] / "tokenizer.json").read_bytes()
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == expected
    assert not (tmp_path / "merged" / SAVING).exists()


@pytest.mark.parametrize("where", ["the directory that it runs in", "a link"])
def test_it_merges_into(trained, tmp_path, monkeypatch, where):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    assert run(trained[1], "." if where.endswith("in") else tmp_path / "link").exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "real")), trained[2])
    assert (tmp_path / "link").is_symlink()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "real").iterdir()} == {0o666 & ~umask()}


def umask():
    now = os.umask(0)
    os.umask(now)
    return now
