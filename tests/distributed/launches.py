"""Two processes of each launcher, as a user starts them but over gloo, and one process beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file
from small_models import load, save_llama, tokens
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = ROOT / "examples" / "distributed"
TRAIN = CONFIGURATIONS / "train.py"
LAUNCHERS = {
    "DDP": "ddp",
    "FSDP1": "fsdp1",
    "FSDP2": "fsdp2",
    "ZeRO-1": "zero1",
    "ZeRO-2": "zero2",
    "ZeRO-3": "zero3",
}
"""The configuration file of each."""

STEPS, SAVED, KILLED = 4, 2, 3
"""Steps of a run, the one after which it is saved, and the one after which its second process is killed."""


@dataclass(frozen=True)
class Launch:
    """What two processes did: killed in the middle, and then started again with the same command."""

    folder: Path
    killed: tuple[int, str]
    resumed: tuple[int, str]

    @property
    def sent(self) -> list[tuple[str, list[int]]]:
        """Each collective of the last step, with the bytes of its tensors."""
        return json.loads((self.folder / "sent.json").read_text())


class Scene:
    """A small checkpoint in bf16, texts, and the runs on them, each of which is made once for all workers of pytest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with self._lock("scene"):
            if not (folder / "texts.txt").exists():
                save_llama(folder / "fp32")
                for name, dtype in (("bf16", torch.bfloat16), ("exact", torch.float32)):
                    load(folder / "fp32").to(dtype).save_pretrained(folder / name)  # the same values
                    AutoTokenizer.from_pretrained(folder / "fp32").save_pretrained(folder / name)
                lines = [" ".join(f"w{int(token)}" for token in row) for row in tokens(32, 12)]
                (folder / "texts.txt").write_text("\n".join(lines))

    def one_process(self, checkpoint: str = "bf16") -> Path:
        """The folder of a run of one process with the batch of two, on "bf16", or the same weights as "exact" fp32."""
        folder = self.folder / f"one-{checkpoint}"
        with self._lock(folder.name):
            if not (folder / "adapter").exists():
                code, output = self._run(
                    [sys.executable, str(TRAIN)], checkpoint, folder, 4, {"ACCELERATE_USE_CPU": "1"}
                )
                assert code == 0, output[-3000:]
        return folder

    def launch(self, launcher: str) -> Launch:
        """Two processes, of which the second is killed, and again two."""
        folder = self.folder / launcher
        self.one_process()  # prepares the checkpoint into the cache
        with self._lock(launcher):
            if not (folder / "outputs.json").exists():
                file = CONFIGURATIONS / f"{LAUNCHERS[launcher]}.yaml"
                options = ["--config_file", str(file), "--main_process_port", "0"]
                script = [str(Path(__file__).with_name("on_cpus.py")), str(TRAIN)]
                command = [sys.executable, "-m", "accelerate.commands.launch", *options, *script]
                killed = self._run(command, "bf16", folder, 2, {"QSVFT_TEST_KILL_AT": str(KILLED)})
                if (folder / f"checkpoint-{SAVED}").exists():  # and what a kill while saving would leave
                    (folder / f"checkpoint-{KILLED}").mkdir()
                resumed = self._run(command, "bf16", folder, 2, {"QSVFT_TEST_SENT": str(folder / "sent.json")})
                folder.mkdir(exist_ok=True)
                (folder / "outputs.json").write_text(json.dumps([killed, resumed]))
        return Launch(folder, *(tuple(one) for one in json.loads((folder / "outputs.json").read_text())))

    def _run(self, command: list[str], checkpoint: str, folder: Path, batch: int, more: dict) -> tuple[int, str]:
        arguments = [str(self.folder / checkpoint), str(self.folder / "texts.txt"), str(folder)]
        sizes = ["--steps", STEPS, "--save-steps", SAVED, "--batch", batch, "--rank", 16]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "ACCELERATE_TORCH_DEVICE": "cpu",
            "ACCELERATE_BYPASS_DEVICE_MAP": "true",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "QSVFT_CACHE": str(self.folder / "cache"),
            **more,
        }
        done = subprocess.run(
            [*command, *arguments, *map(str, sizes)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
            check=False,
        )
        return done.returncode, done.stdout

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f"{name}.lock")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file."""
    return load_file(folder / "adapter_model.safetensors")


def all_of_M(folder: Path) -> torch.Tensor:
    """M of all layers, end to end."""
    return torch.cat([M.flatten() for name, M in sorted(adapter(folder).items()) if ".qsvft_M" in name])


def losses(checkpoint: Path) -> list[float]:
    """Of each step, as the Trainer wrote it."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
