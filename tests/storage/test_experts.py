"""Experts as linear layers compute what transformers' parameters of three dimensions compute, and become them again."""

import copy
import logging
import pickle

import pytest
import torch
from needs import need
from small_models import load
from torch import nn
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
)
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import qsvft
from qsvft.storage.experts import evenly, expert_layers, expert_parameters, is_split, join_experts, split_experts
from qsvft.storage.quantization import dequantize

H, INNER, E, ROWS = 16, 24, 5, 11
SIZES = {"hidden_size": H, "intermediate_size": INNER}
KINDS = {
    "Mixtral": (MixtralExperts, MixtralConfig(**SIZES, num_local_experts=E)),
    "gpt-oss": (
        GptOssExperts,
        GptOssConfig(**SIZES, num_local_experts=E),
    ),  # transposed, with biases, a gate of its own
    "Aria": (AriaExperts, AriaTextConfig(**SIZES, moe_num_experts=E, num_attention_heads=2)),  # transposed
    "Nemotron-H": (  # without a gate
        NemotronHExperts,
        NemotronHConfig(**SIZES, n_routed_experts=E, moe_intermediate_size=INNER, num_attention_heads=2),
    ),
}
SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTRAL = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 128, "num_local_experts": 4}


def mixtral(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**MIXTRAL)).to(dtype)


@pytest.fixture(params=KINDS)
def experts(request):
    kind, config = KINDS[request.param]
    if request.param == "Aria":
        need("transformers", "5.18", "holds Aria's experts in modules of their own")
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    module = kind(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def routed(k=2, experts=3):
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(ROWS)])
    return (
        torch.randn(ROWS, H, generator=generator, dtype=torch.float64),
        index,
        torch.rand(ROWS, k, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_outputs_and_gradients_are_those_of_the_parameters(experts, implementation):
    experts.config._experts_implementation = implementation
    split = split_experts(copy.deepcopy(experts))
    x, index, w = routed()
    found = {}
    for module in (experts, split):
        inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = module(inputs[0], index, inputs[1])
        (y * torch.arange(H)).sum().backward()
        found[module] = [y, inputs[0].grad, inputs[1].grad]
    for one, other in zip(*found.values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    for leaf in expert_parameters(experts):
        layers = getattr(split, leaf)
        expected = getattr(experts, leaf).grad
        if experts.is_transposed:
            expected = expected.transpose(1, 2)
        assert torch.allclose(torch.stack([layer.weight.grad for layer in layers]), expected, rtol=1e-10, atol=1e-10)


def test_they_copy_nothing_and_become_the_parameters_again(experts):
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    names, kind = expert_parameters(experts), type(experts)
    places = {name: getattr(experts, name).untyped_storage().data_ptr() for name in names}
    assert split_experts(experts) is experts and is_split(experts) and expert_parameters(experts) == ()
    for name in names:
        layers = getattr(experts, name)
        assert len(layers) == E and {layer.weight.untyped_storage().data_ptr() for layer in layers} == {places[name]}
    assert expert_layers(experts) == {f"{name}.{number}": name for name in names for number in range(E)}
    join_experts(experts)
    assert type(experts) is kind and not is_split(experts)
    after = experts.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in experts.parameters())


def test_a_copy_and_a_pickle_are_split_as_well(experts):
    split_experts(experts)
    x, index, w = routed()
    for again in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert is_split(again) and torch.equal(again(x, index, w), experts(x, index, w))


def test_rows_of_no_expert_and_no_rows_at_all(experts):
    split_experts(experts)
    x, index, w = routed()
    index[3:5] = E  # as transformers masks a row
    whole, masked = experts(x, routed()[1], w), experts(x, index, w)
    assert not masked[3:5].any()
    assert torch.equal(masked[:3], whole[:3]) and torch.equal(masked[5:], whole[5:])
    index[:] = E
    with torch.no_grad():
        assert torch.equal(experts(x, index, w), torch.zeros_like(x))
        assert experts(x[:0], index[:0], w[:0]).shape == (0, H)


def test_in_training_an_expert_without_rows_has_a_gradient_of_zero(experts):
    split_experts(experts)
    x, index, w = routed(experts=3)
    experts(x, index, w).sum().backward()
    for leaf in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        grads = [layer.weight.grad for layer in getattr(experts, leaf)]
        assert all(grad is not None for grad in grads)
        assert [bool(grad.any()) for grad in grads] == [True] * 3 + [False] * (E - 3)


def test_rows_are_counted_as_spread_evenly_where_there_are_no_values():
    assert evenly(10, 4) == [3, 3, 2, 2] and evenly(2, 4) == [1, 1, 0, 0]
    split = split_experts(KINDS["Mixtral"][0](KINDS["Mixtral"][1]).to("meta"))
    x, index, w = (one.to("meta") for one in routed())
    assert split(x.float(), index, w.float()).shape == x.shape


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_experts_compute_as_their_weights_say(bits):
    model, x = mixtral(torch.float32), torch.randint(0, 96, (2, 12))
    quantised = qsvft.quantize(copy.deepcopy(model), bits, progress=False).eval()
    kinds = {type(layer).__name__ for layer in quantised.model.layers[0].mlp.experts.down_proj}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    with torch.no_grad():
        found = quantised(x).logits
        dense = dequantize(copy.deepcopy(quantised)).eval()
        assert type(dense.model.layers[0].mlp.experts) is MixtralExperts
        expected = dense(x).logits
        # int8 rounds what goes into a layer as well
        assert (found - expected).norm() < (1e-6 if bits == 4 else 0.02) * expected.norm()
        assert (found - model.eval()(x).logits).norm() > 1e-3 * expected.norm()
    floats = [p.numel() for p in quantised.model.layers.parameters() if p.dim() > 1 and p.is_floating_point()]
    assert sum(floats) == 2 * MIXTRAL["num_local_experts"] * MIXTRAL["hidden_size"]  # the routers


def test_what_is_skipped_stays_in_parameters():
    model = qsvft.quantize(mixtral(), 4, skip_modules=["layers.0.mlp"], progress=False)
    assert not is_split(model.model.layers[0].mlp.experts) and is_split(model.model.layers[1].mlp.experts)


def test_a_quantised_model_is_not_saved_as_what_transformers_would_fill_with_noise(tmp_path):
    model = qsvft.quantize(mixtral(), 4, progress=False)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM: its experts are linear layers of their own.*prepare"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_experts_that_transformers_left_dense_are_named(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="qsvft")
    mixtral().save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options, dtype=torch.bfloat16)
    qsvft.prepare(model, 4, progress=False, rank=8)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "MixtralForCausalLM: its experts stay dense" in said and "model.layers.0.mlp.experts.gate_up_proj" in said
    caplog.clear()
    qsvft.quantize(qsvft.quantize(mixtral(), 4, progress=False), 4)
    assert caplog.records == []


def test_a_model_without_experts_is_left_alone(llama):
    model = load(llama)
    before = list(model.state_dict())
    assert list(split_experts(model).state_dict()) == before and not expert_layers(model)
