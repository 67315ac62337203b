"""An adapter trains, is saved, loaded and merged on whatever computes W x: each cell of the table in docs/bases.md."""

import pytest
import torch
from peft import PeftModel
from quantised_bases import ANSWERS, BASES, GIVEN
from small_models import logits, randomize, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import qsvft
from qsvft.storage import packed
from qsvft.storage.quantization import dequantize, held_bits
from qsvft.storage.weights import weight_as_held
from qsvft.tuner import QSVFTLinear

VARIANTS = [
    pytest.param(base, make, id=f"{base.name}-{variant}") for base in BASES for variant, make in base.made.items()
]
EACH_BASE = pytest.mark.parametrize(("base", "make"), VARIANTS)
LAYER = "model.layers.0.self_attn.q_proj"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(torchao|hqq|optimum|gptqmodel).*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(torchao|hqq|optimum|gptqmodel).*"),
]


def prepared(model, **options):
    torch.manual_seed(0)
    return qsvft.prepare(model, held_bits(model), progress=False, **{"rank": 8, **options})


def refuses(base, make, folder):
    """Whether a base is one that is refused, and is, before anything is changed."""
    if not base.refused:
        return False
    model = make(folder)
    with pytest.raises(TypeError, match=rf"(?s)^model\.layers\.0\.self_attn\.q_proj: {base.refused}"):
        prepared(model)
    assert not any(isinstance(module, QSVFTLinear) for module in model.modules())
    return True


def gradients(model):
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def gives_a_gradient(layer, x):
    try:
        (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    except RuntimeError:
        return False
    return bool(grad.any())


@EACH_BASE
def test_it_trains_as_a_dense_model_of_the_same_weights(llama, base, make):
    if refuses(base, make, llama):
        return
    layer = make(llama).get_submodule(LAYER)
    assert gives_a_gradient(layer, torch.randn(3, 64).bfloat16()) == (base.gradient != GIVEN)
    model = prepared(make(llama))
    found, expected = gradients(model), gradients(prepared(dequantize(make(llama))))
    assert found.keys() == expected.keys() and len(found) == 14
    for name, grad in expected.items():
        assert (found[name] - grad).norm() < 0.2 * grad.norm(), name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


@EACH_BASE
def test_a_saved_adapter_on_the_same_base_gives_the_same_bits(llama, tmp_path, base, make, caplog):
    if refuses(base, make, llama):
        return
    model = randomize(prepared(make(llama)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(llama), tmp_path)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(make(llama)))
    assert "not bit for bit" not in caplog.text
    with pytest.raises(ValueError, match="this adapter does not fit the base model"):
        PeftModel.from_pretrained(other_weights(make(llama)), tmp_path)


def other_weights(model):
    """The same model with two layers exchanged."""
    (first, second), layer = model.model.layers, "self_attn.q_proj"
    one, other = first.get_submodule(layer), second.get_submodule(layer)
    first.set_submodule(layer, other)
    second.set_submodule(layer, one)
    return model


@EACH_BASE
def test_merged_it_is_a_plain_checkpoint_that_computes_the_same(llama, tmp_path, base, make):
    if refuses(base, make, llama):
        return
    model = randomize(prepared(make(llama)))
    adapted, plain = logits(model), logits(make(llama))
    merged = model.merge_and_unload()
    assert (logits(merged) - adapted).norm() < 0.1 * (adapted - plain).norm()
    assert not any(packed.is_packed(module) for module in merged.modules()) and held_bits(merged) == 16
    assert all(type(p) is nn.Parameter and p.dtype == torch.bfloat16 for p in merged.parameters())
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


@EACH_BASE
def test_its_weight_is_what_it_multiplies_with(llama, base, make, monkeypatch):
    if refuses(base, make, llama):
        return
    read = []
    through = packed.read_through
    monkeypatch.setattr(packed, "read_through", lambda layer: read.append(layer) or through(layer))
    model = make(llama)
    for name in (LAYER, "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        layer = model.get_submodule(name)
        x = torch.randn(20, layer.in_features).bfloat16()
        expected = x.double() @ weight_as_held(layer).double().T
        with torch.no_grad():
            assert (layer(x).double() - expected).norm() < base.error * expected.norm()
    assert len(read) == (3 if base.read == ANSWERS else 0)
