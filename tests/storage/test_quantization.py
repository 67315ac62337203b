"""The quantised base: in place, the right layers, readable back, one dense matrix at a time."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import qsvft.storage.quantization
from qsvft import quantize
from qsvft.storage.quantization import dequantize, disable_cpu_repacking, held_bits
from qsvft.storage.weights import (
    check_weight,
    dense_dtype,
    dense_layer,
    dense_weight,
    describe_base,
    product_without_bias,
    weight_digest,
)

QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
BITS = pytest.mark.parametrize("bits", [4, 8])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Relative error of the weight held: NF4 is at 9 %, int8 below 1 %.
WORST = {4: 0.12, 8: 0.02}


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48, bias=False)).to(dtype)


def llama(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def quantized(model: nn.Module, bits: int = 4, **options) -> nn.Module:
    return quantize(model, bits, progress=False, **options)


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QUANTIZED)}


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@BITS
@DTYPES
def test_linears_are_replaced_in_place_and_keep_their_weight_within_the_rounding_of_the_bits(bits, dtype):
    model = mlp(dtype)
    before = copy.deepcopy(model)
    assert quantized(model, bits) is model
    assert quantized_names(model) == {"0", "2"}
    for index in (0, 2):
        weight = dense_weight(model[index])
        assert weight.shape == before[index].weight.shape
        assert 0 < relative(weight, before[index].weight) < WORST[bits]
    assert torch.equal(model[0].bias, before[0].bias) and model[2].bias is None


@BITS
def test_nothing_trains_in_a_quantised_layer(bits):
    assert [name for name, p in quantized(mlp(), bits).named_parameters() if p.requires_grad] == []


@BITS
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(bits, training):
    model = quantized(mlp().train(training), bits)
    assert all(module.training is training for module in model.modules())
    assert all(module.training is training for module in dequantize(model).modules())


@BITS
@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_are_left_as_they_are(bits, tied):
    model = llama(tied)
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    before = head.detach().clone(), embedding.detach().clone()
    quantized(model, bits)
    assert model.lm_head.weight is head and model.model.embed_tokens.weight is embedding
    assert torch.equal(head, before[0]) and torch.equal(embedding, before[1])
    assert len(quantized_names(model)) == 2 * 7
    assert all(name.startswith("model.layers.") for name in quantized_names(model))


def test_linear_that_shares_its_weight_with_an_embedding_is_left_as_it_is():
    model = nn.ModuleDict({"words": nn.Embedding(64, 32), "out": nn.Linear(32, 64), "other": nn.Linear(32, 64)})
    model["out"].weight = model["words"].weight
    quantized(model)
    assert quantized_names(model) == {"other"}
    assert model["out"].weight is model["words"].weight


def test_modules_that_transformers_keeps_in_fp32_are_left_as_they_are():
    model = llama()
    model._keep_in_fp32_modules = ["down_proj"]
    assert not any("down_proj" in name for name in quantized_names(quantized(model)))


@pytest.mark.parametrize("skip", [["q_proj"], ["self_attn.q_proj"], ["model.layers.0.self_attn.q_proj", "layers.1"]])
def test_skipped_modules_are_found_by_whole_parts_of_their_name(skip):
    everything = quantized_names(quantized(llama()))
    left = everything - quantized_names(quantized(llama(), skip_modules=skip))
    assert left == {n for n in everything if any(f".{part}." in f".{n}." for part in skip)} != set()


def test_a_part_of_a_word_skips_nothing():
    assert len(quantized_names(quantized(llama(), skip_modules=["proj", "q", "ayers"]))) == 2 * 7


def test_sixteen_bits_leave_the_model_as_it_is():
    model = llama()
    before = {name: id(module) for name, module in model.named_modules()}
    assert quantized(model, 16) is model
    assert {name: id(module) for name, module in model.named_modules()} == before


@BITS
def test_layers_that_share_a_weight_share_it_afterwards(bits):
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    x, expected = torch.randn(3, 64), [model[name](torch.eye(64)) - model[name].bias for name in "ab"]
    quantized(model, bits)
    assert model["b"].weight.data_ptr() == model["a"].weight.data_ptr()
    assert model["c"].weight.data_ptr() != model["a"].weight.data_ptr()
    for name, weight in zip("ab", expected, strict=True):
        assert relative(model[name](x) - model[name].bias, x @ weight) < WORST[bits]
        assert relative(dense_weight(model[name]), weight.T) < WORST[bits]


@BITS
def test_a_layer_under_two_names_is_one_quantised_layer_under_both(bits):
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    model["b"] = model["a"]
    quantized(model, bits)
    assert isinstance(model["b"], QUANTIZED)
    assert model["b"] is model["a"]


@BITS
def test_layers_that_share_a_weight_share_it_when_dense_again(bits):
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    dequantize(quantized(model, bits))
    assert model["b"].weight.data_ptr() == model["a"].weight.data_ptr()


@BITS
@pytest.mark.parametrize("build", [llama, gpt2])
def test_logits_stay_close_to_those_of_the_original(bits, build):
    model, ids = build(), torch.arange(12).view(2, 6)
    expected = model(ids).logits
    assert relative(quantized(model, bits)(ids).logits, expected) < 2 * WORST[bits]


@pytest.mark.parametrize("build", [llama, gpt2])
def test_dequantised_model_computes_what_the_quantised_one_computed(build):
    model, ids = quantized(build()), torch.arange(12).view(2, 6)
    expected = model(ids).logits
    assert dequantize(model) is model
    torch.testing.assert_close(model(ids).logits, expected)
    assert quantized_names(model) == set()


@BITS
@pytest.mark.parametrize("build", [llama, gpt2])
def test_dequantised_model_has_the_original_classes_shapes_dtypes_and_flags(bits, build):
    original = build().to(torch.bfloat16)
    model = dequantize(quantized(copy.deepcopy(original), bits))
    for (name, a), (_, b) in zip(model.named_modules(), original.named_modules(), strict=True):
        assert type(a) is type(b), name
    shapes = [{n: (p.shape, p.dtype) for n, p in m.state_dict().items()} for m in (model, original)]
    assert shapes[0] == shapes[1]
    assert not hasattr(model.config, "quantization_config")
    assert held_bits(model) == 16
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"):
        assert flag not in vars(model)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_dequantised_model_saves_and_reloads_as_a_plain_one(build, tmp_path):
    model, ids = dequantize(quantized(build())), torch.arange(12).view(2, 6)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


@BITS
def test_model_carries_the_flags_of_one_that_transformers_quantised(bits):
    model = quantized(llama(), bits)
    assert model.is_quantized and getattr(model, f"is_loaded_in_{bits}bit")
    assert model.config.quantization_config.to_dict()[f"load_in_{bits}bit"] is True
    assert model.hf_quantizer.is_trainable


@BITS
def test_conv1d_is_turned_so_that_the_dense_weight_is_outputs_by_inputs(bits):
    conv = Conv1D(96, 64)
    nn.init.normal_(conv.bias)
    x, weight = torch.randn(3, 64), conv.weight.detach().T.clone()
    assert torch.equal(dense_weight(conv), weight)
    model = quantized(nn.Sequential(copy.deepcopy(conv)), bits)
    assert dense_weight(model[0]).shape == (96, 64)
    assert relative(dense_weight(model[0]), weight) < WORST[bits]
    assert relative(model(x), conv(x)) < WORST[bits]


@BITS
@DTYPES
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 96), lambda: nn.Linear(64, 96, bias=False), lambda: Conv1D(96, 64)]
)
def test_dense_layer_holds_the_weight_and_bias_it_was_given_in_the_original_dtype(bits, dtype, make):
    original = make().to(dtype)
    layer = quantized(nn.Sequential(copy.deepcopy(original)), bits)[0]
    weight = dense_weight(layer)
    dense = dense_layer(layer, weight)
    assert type(dense) is type(original)
    assert dense_dtype(layer) == dense.weight.dtype == dtype
    assert dense.weight.shape == original.weight.shape and dense.weight.is_contiguous()
    assert torch.equal(dense_weight(dense), weight.to(dtype))
    assert (dense.bias is None) == (original.bias is None)
    if dense.bias is not None:
        assert torch.equal(dense.bias, original.bias) and dense.bias is not layer.bias
    assert not any(p.requires_grad for p in dense.parameters())


def test_dense_layer_of_a_plain_one_computes_the_same():
    for layer, x in ((nn.Linear(7, 5), torch.randn(2, 7)), (Conv1D(5, 7), torch.randn(2, 7))):
        torch.testing.assert_close(dense_layer(layer, dense_weight(layer))(x), layer(x))


def test_dense_weight_of_an_unknown_layer_is_none():
    assert dense_weight(nn.Embedding(4, 4)) is None


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 96), lambda: Conv1D(96, 64)])
def test_product_without_bias_is_the_held_weights_and_has_its_gradient(bits, make):
    layer = make()
    nn.init.constant_(layer.bias, 1000.0)
    layer = quantized(nn.Sequential(layer), bits)[0]
    x, g, weight = torch.randn(3, 64, requires_grad=True), torch.randn(3, 96), dense_weight(layer)
    product = product_without_bias(layer, x)
    torch.testing.assert_close(product, x @ weight.T)
    product.backward(g)
    torch.testing.assert_close(x.grad, g @ weight)


def test_product_without_bias_of_a_layer_that_is_only_known_by_its_forward_is_none():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(3, 64)
    assert product_without_bias(Scaled(64, 64), x) is None
    assert product_without_bias(quantized(nn.Sequential(nn.Linear(64, 64)), 8)[0], x) is None


@BITS
def test_quantising_a_dequantised_model_again_keeps_the_weights(bits):
    """What is on the grid stays on it: the bases of an adapter and of its merged copy agree."""
    model = quantized(mlp(), bits)
    weight = dense_weight(model[0]).clone()
    again = dense_weight(quantized(dequantize(model), bits)[0])
    assert relative(again, weight) < 0.1 * WORST[bits]


@BITS
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_leave_the_weight_and_its_digest_unchanged(bits, training):
    model = quantized(mlp().train(training), bits)
    weight, digest = dense_weight(model[0]).clone(), weight_digest(model[0])
    with torch.no_grad():
        model(torch.randn(3, 64))
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert bool((x.grad != 0).any())
    assert torch.equal(dense_weight(model[0]), weight)
    assert weight_digest(model[0]) == digest


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_digest_is_the_same_for_the_same_weight_and_another_for_any_change(bits):
    torch.manual_seed(0)
    base = nn.Linear(64, 96)
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.weight[40, 3] += 1
    scaled = copy.deepcopy(base)
    with torch.no_grad():
        scaled.weight.mul_(2)  # the same packed values, other scales
    layers = (base, copy.deepcopy(base), changed, scaled)
    digests = [weight_digest(quantized(nn.Sequential(layer), bits)[0]) for layer in layers]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_digest_differs_between_bits_and_does_not_depend_on_the_bias():
    base = nn.Linear(64, 96)
    digests = {weight_digest(quantized(nn.Sequential(copy.deepcopy(base)), bits)[0]) for bits in (4, 8, 16)}
    assert len(digests) == 3
    other_bias = copy.deepcopy(base)
    nn.init.ones_(other_bias.bias)
    assert weight_digest(other_bias) == weight_digest(base)


def test_description_of_a_base_names_bits_and_type():
    described = {bits: describe_base(quantized(mlp(torch.bfloat16), bits)[0]) for bits in (4, 8, 16)}
    assert {bits: d["bits"] for bits, d in described.items()} == {4: 4, 8: 8, 16: 16}
    assert described[4]["quant_type"] == "nf4" and described[4]["double_quant"] is True
    assert described[4]["dtype"] == described[16]["dtype"] == "bfloat16"


@pytest.mark.parametrize("bits", [0, 2, 32, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"4 \(NF4\), 8 \(int8\) or 16"):
        quantized(mlp(), bits)


@pytest.mark.parametrize(("first", "second"), [(4, 8), (8, 4)])
def test_quantising_to_other_bits_again_is_refused(first, second):
    with pytest.raises(ValueError, match=f"already quantised to {first} bits; bits={second}"):
        quantized(quantized(mlp(), first), second)


@BITS
@pytest.mark.parametrize("again", [None, 16])
def test_a_quantised_model_comes_back_unchanged(bits, again):
    model = quantized(mlp(), bits)
    layers, digest = [id(layer) for layer in model], weight_digest(model[0])
    assert quantized(model, again or bits) is model
    assert [id(layer) for layer in model] == layers and weight_digest(model[0]) == digest


def damage_nan(weight: Tensor) -> Tensor:
    weight[3, 4] = float("nan")
    return weight


def damage_infinite(weight: Tensor) -> Tensor:
    weight[0, 0], weight[1, 1] = float("inf"), -float("inf")
    return weight


DAMAGE = {
    "NaN": (damage_nan, "1 NaN or Inf values"),
    "infinite": (damage_infinite, "2 NaN or Inf values"),
    "meta": (lambda w: w.to("meta"), "meta device"),
    "fp64": (lambda w: w.double(), "float64 is not supported"),
    "fp8": (lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn is not supported"),
    "int8": (lambda w: w.to(torch.int8), "int8 is not supported"),
}


@BITS
@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_weight_that_cannot_be_quantised_is_refused_by_name_and_nothing_is_changed(bits, damage, words):
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "block": nn.ModuleDict({"second": nn.Linear(8, 8)})})
    bad = model["block"]["second"]
    bad.weight = nn.Parameter(damage(bad.weight.detach().clone()), requires_grad=False)
    with pytest.raises(ValueError, match=rf"^block\.second: .*{words}"):
        quantized(model, bits)
    assert quantized_names(model) == set()


def test_a_bad_weight_that_is_skipped_is_no_reason_to_refuse():
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})
    damage_nan(model["second"].weight.data)
    assert quantized_names(quantized(model, skip_modules=["second"])) == {"first"}


def test_a_4bit_layer_that_was_never_quantised_is_refused():
    with pytest.raises(ValueError, match=r"^proj: .*without quantisation state"):
        check_weight("proj", bnb.nn.Linear4bit(8, 8, quant_type="nf4"))


def test_repacking_is_switched_off_on_every_4bit_layer():
    model = quantized(llama())
    assert {model.get_submodule(name).support_avx512bf16_for_cpu for name in quantized_names(model)} == {False}


@pytest.mark.parametrize("bits", [4, 16])
def test_repacking_is_switched_off_in_a_model_that_came_quantised(bits):
    model = quantized(mlp())
    for index in (0, 2):
        model[index].support_avx512bf16_for_cpu = True
    quantized(model, bits)
    assert not model[0].support_avx512bf16_for_cpu and not model[2].support_avx512bf16_for_cpu


def test_a_packed_weight_is_refused_by_name():
    model = quantized(mlp())
    model[2].weight.quant_state.packing_format_for_cpu = True
    for refuse in (
        lambda: quantized(model),
        lambda: disable_cpu_repacking(model),
        lambda: check_weight("2", model[2]),
    ):
        with pytest.raises(ValueError, match=r"^2: .*repacked"):
            refuse()


@BITS
def test_dense_weights_are_freed_as_quantising_goes(bits, monkeypatch):
    """When a matrix is taken up, all that were taken up before it are gone."""
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(5)], Conv1D(32, 32), nn.Linear(32, 32))
    dense = [StorageWeakRef(layer.weight.untyped_storage()) for layer in model]
    alive = []

    def counting(layer, *args):
        alive.append([not reference.expired() for reference in dense])
        return original(layer, *args)

    original = qsvft.storage.quantization._quantized_layer
    monkeypatch.setattr(qsvft.storage.quantization, "_quantized_layer", counting)
    quantized(model, bits)
    assert alive == [[False] * done + [True] * (7 - done) for done in range(7)]
    assert all(reference.expired() for reference in dense)


def test_quantised_models_hold_a_fraction_of_the_bytes():
    size = {}
    for bits in (4, 8, 16):
        model = quantized(nn.Sequential(nn.Linear(512, 512, bias=False)).to(torch.bfloat16), bits)
        size[bits] = model[0].weight.untyped_storage().nbytes()
    assert size[4] * 4 == size[8] * 2 == size[16]
