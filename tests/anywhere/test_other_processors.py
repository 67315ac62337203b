"""What is made on one processor fits on another: the same weights, factors but for single roundings, and adapters.

The other processor is this one with fewer of its instructions in use; see ``tests/scripts/made_elsewhere.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scripts.made_elsewhere import FORMS, make, probes
from small_models import logits, save_llama
from transformers import AutoModelForCausalLM

import qsvft
from qsvft.tuner.probe import relative_difference

pytestmark = [pytest.mark.anywhere, pytest.mark.slow]

TESTS = Path(__file__).resolve().parents[1]
SETTINGS = {
    "two threads": {"OMP_NUM_THREADS": "2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "1"},
    "no vectors": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "2",
    },
}
NAMES = pytest.mark.parametrize("name", FORMS)

SINGLE_ROUNDINGS = 1e-3
"""The largest share of the stored entries of factors that may round to the other neighbour."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Wide enough for threads to divide the work and for sums to come in another order."""
    return save_llama(
        tmp_path_factory.mktemp("wide"),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=1,
        num_attention_heads=4,
    )


@pytest.fixture(scope="module")
def here(wide, tmp_path_factory):
    """What this process makes."""
    folder = tmp_path_factory.mktemp("here")
    make(wide, folder)
    return folder


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS.keys())
def there(request, wide, here, tmp_path_factory):
    """What a process with other settings makes."""
    folder = tmp_path_factory.mktemp("there") / "made"
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-W", "ignore", str(TESTS / "scripts" / "made_elsewhere.py"), wide, here / "nf4", folder]
    done = subprocess.run(
        command, env={**os.environ, **request.param, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "settings.json").read_text())
    assert found["threads"] == int(request.param["OMP_NUM_THREADS"])
    assert found["capability"].lower() == request.param.get("ATEN_CPU_CAPABILITY", found["capability"]).lower()
    return folder


def tensors_in(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@NAMES
def test_weights_are_the_same_bits(here, there, name):
    found, expected = tensors_in(there / name), tensors_in(here / name)
    assert found.keys() == expected.keys()
    weights = [tensor for tensor in expected if not tensor.startswith("qsvft.")]
    if name == "residual":  # what the vectors leave is as exact as they are
        weights = [tensor for tensor in weights if ".self_attn." not in tensor and ".mlp." not in tensor]
    assert weights
    for tensor in weights:
        assert torch.equal(found[tensor].view(torch.uint8), expected[tensor].view(torch.uint8)), tensor


@NAMES
def test_factors_are_the_same_but_for_single_roundings(here, there, name):
    found, expected = tensors_in(there / name), tensors_in(here / name)
    factors = [tensor for tensor in expected if tensor.startswith("qsvft.")]
    assert factors
    for tensor in factors:
        a, b = found[tensor], expected[tensor]
        if tensor.endswith((".s", ".rms", ".residual_s")):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        else:
            assert float((a != b).double().mean()) <= SINGLE_ROUNDINGS, tensor
        if tensor.endswith(".values"):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-9)


def test_the_probe_of_given_factors_is_the_same_bits(here, there):
    found = load_file(there / "probes.safetensors")
    expected = probes(qsvft.from_pretrained(here / "nf4", progress=False))
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@NAMES
def test_probes_are_far_below_what_is_refused(here, there, name):
    found, expected = (load_file(folder / f"{name} adapter" / "adapter_model.safetensors") for folder in (there, here))
    assert found.keys() == expected.keys()
    saved = [key for key in expected if key.endswith("qsvft_probe")]
    assert saved and all(relative_difference(found[key], expected[key]) < 1e-4 for key in saved)


@NAMES
def test_an_adapter_made_there_does_the_same_on_the_base_made_here(here, there, name):
    """Measured by the change that it makes, with both computed on this processor."""
    bases = {folder: AutoModelForCausalLM.from_pretrained(folder / name) for folder in (here, there)}
    before = logits(bases[here]).float()
    found, expected = (
        logits(PeftModel.from_pretrained(base, there / f"{name} adapter")).float() for base in bases.values()
    )
    change = torch.linalg.vector_norm(expected - before)
    assert float(change) > 0
    assert float(torch.linalg.vector_norm(found - expected) / change) < 1e-3
