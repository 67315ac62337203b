"""What one processor makes, for another to compare: run with other settings of torch, oneDNN and MKL around it.

    python tests/scripts/made_elsewhere.py SOURCE GIVEN TARGET

SOURCE is a checkpoint, GIVEN a directory prepared of it. Into TARGET go, for each form, a prepared directory and an
adapter on it, and the probes that come out on GIVEN.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_models import randomize

import qsvft

ONE_SIDED = {"sides": "one", "pattern": "banded"}
FORMS = {
    "default": {},
    "one-sided": ONE_SIDED,
    "two-sided": {"sides": "both", "pattern": "banded", "factor_bits": 8},
    "nf4": {"factor_bits": 4, "rank": 48, **ONE_SIDED},
    "randomized": {"decomposition": "randomized", "rank": 32, **ONE_SIDED},
    "int8": {"bits": 8},
    "residual": {"sides": "both", "residual": True, "factor_bits": 4, "rank": 64},
}


def probes(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".qsvft_probe." in name}


def make(source, target):
    """A directory and an adapter for each form."""
    for name, options in FORMS.items():
        qsvft.prepare_checkpoint(source, target / name, progress=False, dtype="bfloat16", **options)
        model = randomize(qsvft.from_pretrained(target / name, progress=False))
        model.save_pretrained(target / f"{name} adapter")


if __name__ == "__main__":
    source, given, target = map(Path, sys.argv[1:])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    target.mkdir()
    make(source, target)
    save_file(probes(qsvft.from_pretrained(given, progress=False)), target / "probes.safetensors")
    settings = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    (target / "settings.json").write_text(json.dumps(settings))
