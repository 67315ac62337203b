"""A directory and an adapter that an earlier version wrote are read and mean what they meant, or are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_models import coefficients, logits, same_tensors
from transformers import AutoModelForCausalLM

import qsvft

BEFORE = Path(__file__).parent / "from_before"
SHARED = BEFORE / "shared_inputs"
BOUND = 1e-3  # of the largest logit; another processor rounds otherwise, another factor moves them by half


@pytest.fixture
def prepared(tmp_path):
    """A copy: what reads it may not need to write beside it, and shall not here."""
    return shutil.copytree(BEFORE / "prepared", tmp_path / "prepared")


def recorded():
    return torch.tensor(json.loads((BEFORE / "logits.json").read_text()))


def as_before(model):
    found, expected = logits(model).float().flatten()[::37], recorded()
    return bool((found - expected).abs().max() <= BOUND * expected.abs().max())


@pytest.mark.parametrize("adapter", ["adapter", "self-contained"])
def test_an_adapter_from_before_does_what_it_did(prepared, adapter):
    model = qsvft.from_pretrained(prepared, adapter=BEFORE / adapter, progress=False)
    assert as_before(model)
    with model.disable_adapter():
        assert not as_before(model)
    stored = load_file(BEFORE / adapter / "adapter_model.safetensors")
    held = {name.removesuffix(".default.weight"): M for name, M in coefficients(model).items()}
    assert same_tensors(held, {name: M for name, M in stored.items() if name.endswith("qsvft_M")})


@pytest.mark.parametrize("adapter", ["adapter", "self-contained"])
def test_plain_peft_reads_it_too(prepared, adapter):
    base = AutoModelForCausalLM.from_pretrained(prepared)
    assert as_before(PeftModel.from_pretrained(base, BEFORE / adapter))


def test_saved_again_it_is_the_same(prepared, tmp_path):
    model = qsvft.from_pretrained(prepared, adapter=BEFORE / "self-contained", progress=False)
    model.save_pretrained(tmp_path / "again")
    before, again = (
        {name.removesuffix(".weight"): M for name, M in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (BEFORE / "self-contained", tmp_path / "again")
    )
    assert again.keys() - before.keys() == {"base_model.model.qsvft_whole"} and not before.keys() - again.keys()
    for name in before:
        if name.endswith(("qsvft_probe", ".sketch")):  # those computed here take their place
            assert torch.allclose(before[name], again[name], rtol=1e-3, atol=1e-3)
        elif not name.endswith("qsvft_digest"):  # over the probe as well
            assert torch.equal(before[name], again[name]), name


@pytest.mark.parametrize("adapter", ["adapter", "self-contained"])
def test_an_adapter_of_an_option_that_is_gone_is_refused(prepared, adapter):
    message = r"adapter_config\.json: found share_inputs=True, .* expected share_inputs=False"
    with pytest.raises(ValueError, match=message):
        qsvft.from_pretrained(prepared, adapter=SHARED / adapter, progress=False)
    base = AutoModelForCausalLM.from_pretrained(prepared)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, SHARED / adapter)
    with pytest.raises(ValueError, match=message):
        base.load_adapter(str(SHARED / adapter))


def test_a_directory_of_an_option_that_is_gone_is_refused(prepared):
    directory = SHARED / "prepared"
    message = r"found share_inputs=True, .* expected share_inputs=False\. .* prepare the checkpoint again"
    with pytest.raises(ValueError, match=message):
        qsvft.from_pretrained(directory, progress=False)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match=rf"{directory}: {message}"):
        qsvft.use_factors(AutoModelForCausalLM.from_pretrained(prepared), directory)
