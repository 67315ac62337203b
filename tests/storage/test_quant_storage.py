"""4-bit weights whose bytes lie in tensors of another dtype (``bnb_4bit_quant_storage``): all is as with uint8's."""

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from small_models import coefficients, logits, randomize, same_tensors, save_llama, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qsvft
from qsvft.storage import nf4_product

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
STORAGE = pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
OPTIONS = {
    "some layers": {"rank": 8, "target_modules": ["up_proj"]},
    "one-sided band": {"sides": "one", "pattern": "banded", "off_diagonals": 2},
    "calibrated": {"rank": 8, "calibration": [{"input_ids": tokens(), "labels": tokens()}]},
    "lean": {"rank": 8, "quantize_embeddings": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def base(folder, storage, double=True):
    settings = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=double, bnb_4bit_quant_storage=storage)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)


def trained(folder, storage, **options):
    torch.manual_seed(0)
    model = qsvft.prepare(base(folder, storage), progress=False, **options)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return randomize(model), gradients


@STORAGE
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_trains_saves_loads_and_merges_as_uint8_does(folder, tmp_path, storage, options, monkeypatch):
    monkeypatch.setattr(nf4_product, "DENSE_BYTES", 1024)  # products in slices, as of large weights and many tokens
    monkeypatch.setattr(nf4_product, "LEAST_TOKENS", 1)
    expected, expected_gradients = trained(folder, torch.uint8, **options)
    model, gradients = trained(folder, storage, **options)
    assert same_tensors(gradients, expected_gradients)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path, include_factors="calibration" in options)
    for other in (storage, torch.uint8):
        fresh = base(folder, other)
        if "quantize_embeddings" in options:
            fresh = qsvft.vocabulary.quantize_embeddings(fresh, 8)
        again = PeftModel.from_pretrained(fresh, tmp_path)
        assert torch.equal(logits(again), logits(expected))
        assert same_tensors(coefficients(again), coefficients(expected))
    assert torch.equal(logits(model.merge_and_unload()), logits(expected.merge_and_unload()))


@STORAGE
@pytest.mark.parametrize("options", [{"rank": 8}, OPTIONS["one-sided band"]], ids=str)
def test_a_weight_without_its_state_as_fsdp_gathers_it_is_the_same(folder, tmp_path, storage, options):
    model, expected = (randomize(trained(folder, storage, **options)[0]) for _ in range(2))
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(PeftModel.from_pretrained(base(folder, storage), tmp_path)), logits(expected))
