"""Layers that other libraries pack: told from others, read as they compute, given a gradient, refused by name."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from quantised_bases import InferenceLinear, PackedLinear, PackedTensor, in_a_tensor
from small_models import load, logits, randomize, tokens
from torch import nn

import qsvft
from qsvft.storage.packed import check_product, is_packed, packing, plain_packed, read_packed, ready_packed
from qsvft.storage.weights import check_weight, describe_base, stored_tensors, weight_digest

M, N = 48, 32
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def linear(dtype=torch.float32, bias=True, size=1.0):
    layer = nn.Linear(N, M, bias=bias).to(dtype).requires_grad_(False)
    if bias:
        layer.bias.mul_(size)
    return layer


class Dequantizes(PackedLinear):
    """It has a ``dequantize()``, and what that gives is told to it."""

    def dequantize(self):
        return self.gives(self.hidden())


class RaisesInTheBackward(PackedLinear):
    """Its kernel has no derivative, which it says when it is asked."""

    def forward(self, x):
        return Underived.apply(x, self)


class Underived(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        return PackedLinear.forward(layer, x)

    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("derivative for this kernel is not implemented")


class WrongGradient(PackedLinear):
    """As of a kernel that rounds x and passes the gradient on as if it had scaled it."""

    def forward(self, x):
        return super().forward(x.detach()) + 0 * x.sum()


class Kernel(PackedLinear):
    """Made for another device."""

    def forward(self, x):
        raise RuntimeError("no kernel for cpu")


class Rectifies(PackedLinear):
    def forward(self, x):
        return super().forward(x).relu()


class Returns(PackedLinear):
    def forward(self, x):
        return super().forward(x), None


def test_packed_is_what_holds_no_dense_matrix_in_its_own_or_torchs_way():
    assert is_packed(PackedLinear(linear())) and is_packed(in_a_tensor(linear()))
    fp8 = PackedLinear(linear())
    fp8.register_buffer("codes", fp8.codes.float().to(torch.float8_e4m3fn))
    assert is_packed(fp8)
    around = nn.Sequential(PackedLinear(linear()))
    around.in_features, around.out_features = N, M
    floats = PackedLinear(linear())
    floats.register_buffer("codes", floats.codes.float())
    for layer in (linear(), linear(torch.float64), nn.Embedding(4, 4), nn.BatchNorm1d(4), around, floats):
        assert not is_packed(layer)
    for bits in (4, 8):
        assert not any(map(is_packed, qsvft.quantize(nn.Sequential(linear()), bits, progress=False).modules()))


@DTYPES
def test_the_weight_is_read_to_the_bit_whatever_the_bias(dtype):
    for bias in (False, True):
        layer = PackedLinear(linear(dtype, bias, size=1000.0))
        held = layer.bias
        assert torch.equal(read_packed(layer), layer.hidden()) and layer.bias is held


def test_what_dequantize_gives_is_taken_where_the_layer_multiplies_with_it(monkeypatch):
    layer = Dequantizes(linear())
    near = layer.hidden() + 1e-6
    for gives, expected in {
        lambda W: W + 1e-6: near,
        lambda W: 2 * W: layer.hidden(),
        lambda W: W.t(): layer.hidden(),
        lambda W: W.to(torch.float64): layer.hidden(),
    }.items():
        layer.gives = gives
        assert torch.equal(read_packed(layer), expected)

    def cannot(W):
        raise NotImplementedError

    layer.gives = cannot
    assert torch.equal(read_packed(layer), layer.hidden())


@DTYPES
@pytest.mark.parametrize("kind", [InferenceLinear, RaisesInTheBackward, WrongGradient])
@pytest.mark.parametrize("trains_bias", [False, True])
def test_a_kernel_without_a_gradient_gets_that_of_its_weight(dtype, kind, trains_bias):
    layer = kind(linear(dtype))
    W, x, g = layer.hidden(), torch.randn(2, 3, N).to(dtype), torch.randn(2, 3, M).to(dtype)
    expected = layer(x)
    ready_packed(nn.Sequential(layer))
    layer.bias.requires_grad_(trains_bias)
    x.requires_grad_()
    y = layer(x)
    assert torch.equal(y, expected) and type(layer).__name__ == kind.__name__ and isinstance(layer, kind)
    wanted = [x, layer.bias] if trains_bias else [x]
    grad, *of_bias = torch.autograd.grad(y, wanted, g)
    assert torch.equal(grad, g @ W)
    assert all(torch.equal(one, g.flatten(0, 1).sum(0)) for one in of_bias)
    with torch.no_grad():
        assert not layer(x).requires_grad
    plain_packed(nn.Sequential(layer))
    assert type(layer) is kind and not hasattr(layer, "qsvft_dtype")


def test_a_kernel_with_a_gradient_stays_as_it_is():
    layer = PackedLinear(linear())
    ready_packed(nn.Sequential(layer))
    assert type(layer) is PackedLinear


def test_a_layer_that_got_a_gradient_is_copied_and_pickled():
    layer = InferenceLinear(linear())
    ready_packed(nn.Sequential(layer))
    x = torch.randn(2, N, requires_grad=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (grad,) = torch.autograd.grad(other(x).sum(), x)
        assert torch.equal(other(x), layer(x)) and grad.any()


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Kernel, r"its forward raised RuntimeError: no kernel for cpu; expected .* Move the model to the device"),
        (Rectifies, r"f\(x \+ y\) - f\(x\) - f\(y\) \+ f\(0\) is 0\.\d+ of .*, where at most 0\.25 was expected"),
        (Returns, r"its forward gave tuple of \(4, 32\), where \(4, 48\) was expected"),
    ],
)
def test_what_does_not_compute_a_linear_map_here_is_refused_before_anything_changes(kind, found):
    model = nn.Sequential(nn.Linear(N, N), kind(linear()))
    with pytest.raises(TypeError, match=rf"^1: cannot adapt a {kind.__name__}: {found}"):
        qsvft.prepare(model, 16, progress=False)
    assert type(model[0]) is nn.Linear and type(model[1]) is kind
    adapted = qsvft.prepare(model, 16, exclude_modules=["1"], progress=False).base_model.model
    assert type(adapted[1]) is kind


def test_a_layer_without_values_is_read_as_one():
    layer = PackedLinear(linear(torch.bfloat16)).to("meta")
    check_product("layer", layer)
    assert read_packed(layer).is_meta and read_packed(layer).shape == (M, N) and weight_digest(layer) == b""


def test_a_weight_of_another_dtype_in_a_plain_layer_is_refused():
    layer = linear()
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"^layer: weight dtype torch\.float8_e4m3fn is not supported"):
        check_weight("layer", layer)


def test_the_record_names_the_class_and_the_digest_is_of_the_weight_that_is_read():
    layer, other = PackedLinear(linear(torch.bfloat16)), PackedLinear(linear(torch.bfloat16))
    assert describe_base(layer) == {"bits": 16, "quant_type": "PackedLinear", "dtype": "bfloat16"} and packing(layer)
    (read,) = stored_tensors(layer)
    assert torch.equal(read, layer.hidden())
    assert weight_digest(layer) == weight_digest(copy.deepcopy(layer)) != weight_digest(other)
    assert len(weight_digest(layer)) == 32


def packed_llama(folder, kind=PackedLinear):
    model = load(folder).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, kind(module))
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_is_not_quantised_again(llama, bits):
    model = packed_llama(llama)
    with pytest.raises(
        ValueError, match=rf"q_proj: the model is quantised already, found PackedLinear; bits={bits} .*16"
    ):
        qsvft.prepare(model, bits, progress=False)
    assert type(model.model.layers[0].self_attn.q_proj) is PackedLinear


def test_a_packed_base_has_no_residual(llama):
    with pytest.raises(ValueError, match=r"residual=True needs the dense weight, found a PackedLinear"):
        get_peft_model(packed_llama(llama), qsvft.QSVFTConfig(rank=8, residual=True))


@pytest.mark.parametrize("kind", [PackedLinear, InferenceLinear, in_a_tensor])
def test_layers_that_are_not_adapted_pass_the_gradient_on_and_are_merged_as_well(llama, kind):
    expected = qsvft.prepare(packed_llama(llama), 16, rank=8, target_modules=["q_proj"], progress=False)
    model = qsvft.prepare(packed_llama(llama, kind), 16, rank=8, target_modules=["q_proj"], progress=False)
    for one in (expected, model):
        one(input_ids=tokens(), labels=tokens()).loss.backward()
    wanted, found = ({n: p.grad for n, p in one.named_parameters() if p.requires_grad} for one in (expected, model))
    assert wanted.keys() == found.keys() and len(wanted) == 2
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() < 0.05 * grad.norm(), name
    before = logits(randomize(model))
    merged = model.merge_and_unload()
    assert not any(is_packed(module) for module in merged.modules())
    assert (logits(merged) - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("kind", [PackedLinear, InferenceLinear])
def test_directions_come_from_data_on_a_packed_base(llama, kind):
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    expected = qsvft.prepare(packed_llama(llama), 16, rank=8, calibration=batches, progress=False)
    model = qsvft.prepare(packed_llama(llama, kind), 16, rank=8, calibration=batches, progress=False)
    assert model.peft_config["default"].residual is False
    found, wanted = logits(randomize(model)), logits(randomize(expected))
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_who_asks_for_an_adapted_layers_weight_gets_that_of_the_library(llama):
    model = qsvft.prepare(packed_llama(llama, in_a_tensor), 16, rank=8, progress=False)
    weight = model.model.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is PackedTensor and (weight.dtype, weight.shape) == (torch.bfloat16, (64, 64))


def test_unloading_gives_the_base_back_as_it_was(llama):
    base = packed_llama(llama, InferenceLinear)
    expected = logits(base)
    model = randomize(qsvft.prepare(base, 16, rank=8, progress=False))
    model.merge_adapter()
    found = model.unload()
    assert torch.equal(logits(found), expected)
    layers = [module for module in found.modules() if is_packed(module)]
    assert len(layers) == 14 and all(type(layer) is InferenceLinear for layer in layers)


def test_a_second_adapter_and_the_head_stay_apart(llama):
    model = packed_llama(llama)
    model.lm_head = PackedLinear(model.lm_head)
    model = qsvft.prepare(model, 16, rank=8, progress=False)
    assert type(model.lm_head) is PackedLinear
    model.add_adapter("b", qsvft.QSVFTConfig(rank=4, task_type="CAUSAL_LM"))
    assert type(model.model.model.layers[0].self_attn.q_proj.get_base_layer()) is PackedLinear


def test_merged_layers_have_the_dtype_that_the_model_computes_in(llama):
    """GPTQ's scales are fp16 in a model in bf16."""
    model = packed_llama(llama)
    for module in model.modules():
        if is_packed(module):
            module.scale = module.scale.half()
            module.hidden = lambda module=module: (module.codes * module.scale).to(torch.bfloat16)
    merged = qsvft.prepare(model, 16, rank=8, target_modules=["q_proj"], progress=False).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert logits(merged).dtype == torch.bfloat16


def test_no_base_is_made_up_for_an_adapter_of_another_librarys(llama, tmp_path):
    qsvft.prepare(packed_llama(llama), 16, rank=8, progress=False).save_pretrained(tmp_path / "adapter")
    said = r"base was held as PackedLinear, by another library; expected one of .*PeftModel\.from_pretrained"
    for door in (
        lambda: qsvft.load(tmp_path / "adapter", base=llama, cache_dir=tmp_path),
        lambda: qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=llama),
        lambda: qsvft.export(tmp_path / "adapter", tmp_path / "merged", format="dense", base=llama),
    ):
        with pytest.raises(ValueError, match=said):
            door()
    again = PeftModel.from_pretrained(packed_llama(llama), tmp_path / "adapter")
    assert not torch.equal(logits(randomize(again)), logits(packed_llama(llama)))
