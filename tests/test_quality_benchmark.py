"""The benchmark of learning: every variant runs, what is done is not repeated, a partial file gives a table."""

import json
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
from transformers.utils import logging

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WORDS = ("good", "fine", "great", "bad", "dull", "poor", "film", "plot", "a", "the")


@pytest.fixture
def quality(monkeypatch):
    """The benchmark's module with one learning rate a variant."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the module adds to it
    import quality as module

    once = {name: module.Variant(variant.make, variant.rates[:1]) for name, variant in module.VARIANTS.items()}
    monkeypatch.setattr(module, "VARIANTS", once)
    verbosity = logging.get_verbosity()
    yield module
    logging.set_verbosity(verbosity)
    for name in ("quality", "results"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Arguments of the command: a small BERT of random weights, and sentences whose third word gives the class."""
    folder = tmp_path_factory.mktemp("toy")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    lines = [f"the {noun} {word}\t{index < 3:d}" for noun in WORDS[6:] for index, word in enumerate(WORDS[:6])]
    (folder / "sentences.tsv").write_text("\n".join(lines))
    data = str(folder / "sentences.tsv")
    return ["--model", str(folder), "--train", data, "--dev", data, "--steps", "2", "--batch-size", "4"]


def runs(path):
    return json.loads(path.read_text())["runs"]


def test_every_variant_trains_and_has_its_line_in_the_table_and_the_picture(quality, toy, tmp_path, capsys):
    file, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    quality.main([*toy, "--json", str(file), "--seeds", "0", "--plot", str(picture)])
    table = capsys.readouterr().out
    found = {run["variant"]: run for run in runs(file)}
    assert list(found) == list(quality.VARIANTS)
    for name, run in found.items():
        assert name in table
        assert run["loss"] > 0 and 0 <= run["accuracy"] <= 1
    factors = {name: run["factor_bytes"] for name, run in found.items()}
    assert factors["hadamard"] < factors["one-sided NF4, shared"] < factors["one-sided NF4"] < factors["one-sided int8"]
    assert factors["one-sided int8"] < factors["one-sided bf16"] < factors["two-sided bf16"]
    assert factors["one-sided NF4, rank 96"] < factors["one-sided NF4"]
    assert found["two-sided bf16"]["frozen_bytes"] > factors["two-sided bf16"]
    assert picture.stat().st_size > 0


def test_an_interrupted_sweep_goes_on_where_it_was_and_repeats_nothing(quality, toy, tmp_path, monkeypatch, capsys):
    file = tmp_path / "quality.json"
    command = [*toy, "--json", str(file), "--seeds", "0", "1", "--variants", quality.REFERENCE, "one-sided NF4"]
    train_once, begun = quality.train_once, []

    def interrupted(task, variant, rate, seed):
        begun.append(seed)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return train_once(task, variant, rate, seed)

    monkeypatch.setattr(quality, "train_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quality.main(command)
    kept = runs(file)
    assert [run["seed"] for run in kept] == [0, 1, 0]

    quality.main(["--json", str(file), "--report-only"])
    assert "one-sided NF4" not in capsys.readouterr().out  # a variant with a seed missing has no mean yet

    quality.main(command)
    assert runs(file)[:3] == kept
    assert len(runs(file)) == 4 and len(begun) == 5
    assert "one-sided NF4" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_loss(quality, toy, tmp_path):
    losses = []
    for name in ("first.json", "second.json"):
        quality.main([*toy, "--json", str(tmp_path / name), "--seeds", "3", "--variants", quality.REFERENCE])
        losses.append(runs(tmp_path / name)[0]["loss"])
    assert losses[0] == losses[1]


def test_runs_of_other_settings_are_not_continued(quality, toy, tmp_path):
    file = tmp_path / "quality.json"
    quality.main([*toy, "--json", str(file), "--seeds", "0", "--variants", quality.REFERENCE])
    with pytest.raises(SystemExit, match="give another --json"):
        quality.main([*toy, "--json", str(file), "--seeds", "1", "--variants", quality.REFERENCE])


def test_a_bad_line_of_the_data_is_named(quality, toy, tmp_path):
    bad = tmp_path / "bad.tsv"
    bad.write_text("a good film\t1\nno class\n")
    with pytest.raises(SystemExit, match=r"bad\.tsv, line 2"):
        quality.main([*toy, "--json", str(tmp_path / "quality.json"), "--dev", str(bad)])
