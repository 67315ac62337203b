"""``qsvft train`` under a launcher: two processes train what one does, and say it once."""

import subprocess
import sys
from pathlib import Path

import torch
from rows_of import write_rows
from safetensors.torch import load_file
from typer.testing import CliRunner

from qsvft.cli.main import app

TORCHRUN = Path(sys.executable).with_name("torchrun")
FEW = {
    "--rank": 8,
    "--max-steps": 3,
    "--eval-share": 0,
    "--calibration": 0,
    "--set": "warmup_steps=0",
}


def M_of(folder):
    saved = load_file(folder / "adapter_model.safetensors")
    return torch.cat([saved[name].flatten() for name in sorted(saved) if "qsvft_M" in name])


def test_two_processes_train_what_one_does_and_say_it_once(llama, tmp_path, monkeypatch):
    """The checkpoint is in fp32: what differs is the order of sums, and AdamW's division by a small gradient."""
    rows = write_rows(tmp_path, "text")
    words = ["train", "--model", llama, "--dataset", rows, *(word for pair in FEW.items() for word in pair)]
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path / "cache"))
    alone_with = ["--gradient-accumulation-steps", 8, "--output", tmp_path / "one"]
    alone = CliRunner().invoke(app, list(map(str, [*words, *alone_with])))
    assert alone.exit_code == 0, alone.output[-3000:]
    two_of = [TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "qsvft"]
    more = ["--gradient-accumulation-steps", 4, "--output", tmp_path / "two", "--set", "ddp_backend=gloo"]
    done = subprocess.run(list(map(str, [*two_of, *words, *more])), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = {"one": alone.stdout, "two": done.stdout}
    assert "3 of 1 x 4 rows on each of 2" in said["two"]
    assert said["two"].count("trained: ") == said["one"].count("trained: ") == 2  # the numbers before, and the end
    one, two = M_of(tmp_path / "one"), M_of(tmp_path / "two")
    assert one.norm() > 0 and (one - two).norm() < 0.02 * one.norm()
