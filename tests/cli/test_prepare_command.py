"""qsvft prepare: the library's work from the command line, errors in one line."""

import pytest
import torch
from small_models import load, logits
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qsvft
from qsvft.checkpoint.making import job
from qsvft.cli.main import app


def run(*arguments):
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)])


def test_it_prepares_what_the_library_prepares(llama, tmp_path):
    result = run(llama, tmp_path / "prepared", "--rank", 16, "--factor-bits", 4, "--sides", "one")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM: 14 decompositions" in result.output
    assert f"Load it with qsvft.from_pretrained('{tmp_path / 'prepared'}')" in result.output
    model = qsvft.from_pretrained(tmp_path / "prepared", progress=False)
    config = model.peft_config["default"]
    assert (config.rank, config.factor_bits, config.sides) == (16, 4, "one")
    assert torch.equal(logits(model), logits(qsvft.quantize(load(llama, torch.float32), progress=False)))


def test_every_option_arrives(llama, tmp_path):
    options = ["--bits", 4, "--sides", "both", "--residual", "--decomposition", "exact", "--dtype", "bfloat16"]
    result = run(
        llama, tmp_path / "prepared", *options, "--target-modules", "q_proj", "--device", "cpu", "--workers", 1
    )
    assert result.exit_code == 0, result.output
    record = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared").config.quantization_config
    expected = {"sides": "both", "residual": True, "decomposition": "exact", "target_modules": ["q_proj"]}
    assert {name: record.adapter[name] for name in expected} == expected
    assert record.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_dry_run_checks_and_writes_nothing(llama, tmp_path):
    result = run(llama, tmp_path / "prepared", "--dry-run")
    assert result.exit_code == 0
    assert "\n15 files, about 0.00 GiB" in result.output
    assert not (tmp_path / "prepared").exists()


def test_ctrl_c_says_how_to_go_on(llama, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "do", stop)
        result = run(llama, tmp_path / "prepared")
    assert result.exit_code == 130
    assert "qsvft: interrupted with 0 of 15 parts finished" in result.output
    assert run(llama, tmp_path / "prepared").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--bits", 5], "bits must be 4"),
        (["--rank", 999], "rank=999 is over the limit"),
        (["--sides", "three"], "QSVFTConfig.sides"),
        (["--device", "nowhere"], "device: expected"),
        (["--workers", 0], "workers: expected"),
    ],
)
def test_bad_input_takes_one_line_and_exit_code_2(llama, tmp_path, arguments, named):
    result = run(llama, tmp_path / "prepared", *arguments)
    assert result.exit_code == 2
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("qsvft: ")
    assert named in last


def test_a_missing_source_is_named(tmp_path):
    result = run(tmp_path / "nowhere", tmp_path / "prepared")
    assert result.exit_code == 2
    assert "nowhere" in result.output
    assert not (tmp_path / "prepared").exists()
