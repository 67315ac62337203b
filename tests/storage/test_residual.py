"""The residual base: what the factors' rounding loses is in the residual, and the adapter acts on top."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, same_tensors, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

import qsvft
from qsvft.storage.quantization import dequantize
from qsvft.storage.residual import ResidualLinear, residual_linear
from qsvft.storage.weights import dense_weight
from qsvft.tuner import QSVFTLinear

OPTIONS = {"sides": "both", "residual": True, "pattern": "banded", "off_diagonals": 4}
DENSE = {"residual": True, "factor_bits": 8}
FORMS = [{**OPTIONS}, {**OPTIONS, "factor_bits": 8}, {**OPTIONS, "factor_bits": 4, "rank": 16}, DENSE]


def linear(m: int = 96, n: int = 64, bias: bool = True) -> nn.Linear:
    torch.manual_seed(m + n)
    return nn.Linear(n, m, bias=bias)


def error(layer: nn.Module, W: torch.Tensor) -> float:
    return float((dense_weight(layer).double() - W.double()).norm() / W.double().norm())


def nf4_error(W: torch.Tensor) -> float:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight = nn.Parameter(W.clone())
    return error(qsvft.quantize(nn.Sequential(layer), 4, progress=False)[0], W)


def layers(model: nn.Module) -> list[QSVFTLinear]:
    return [m for m in model.modules() if isinstance(m, QSVFTLinear)]


@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96), (64, 64)])
def test_with_all_directions_the_weight_is_nearly_the_original(m, n):
    W = linear(m, n).weight.detach()
    exact = {bits: error(residual_linear(linear(m, n), 64, bits), W) for bits in (16, 8, 4)}
    assert exact[16] < exact[8] < exact[4] < nf4_error(W)
    assert exact[16] < 1e-3 and exact[8] < 2e-3


def test_more_directions_make_the_base_more_exact():
    W = linear().weight.detach()
    errors = [error(residual_linear(linear(), rank, 8), W) for rank in (4, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True) and errors[0] < nf4_error(W)


def test_the_residual_is_taken_from_the_rounded_directions():
    """Rounded to NF4 the directions are off by a tenth, and the weight by far less."""
    W = linear().weight.detach()
    layer = residual_linear(linear(), 64, 4)
    U, V = (layer.basis(side).dense(torch.float64) for side in "UV")
    directions = (U.T * layer.qsvft_s.double()) @ V
    assert error(layer, W) < 0.3 * float((directions - W.double()).norm() / W.double().norm())


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_is_that_of_the_weight_it_says_it_holds(kind, dtype):
    base = linear() if kind == "linear" else Conv1D(96, 64)
    layer = residual_linear(base.to(dtype), 32, 8)
    x = torch.randn(3, 5, 64).to(dtype)
    expected = x.double() @ dense_weight(layer).double().T + layer.bias.double()
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        layer(x).double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    torch.testing.assert_close(
        layer.product(x).double(), expected - layer.bias.double(), rtol=tolerance, atol=tolerance
    )


def test_casting_the_model_leaves_the_scales_and_directions():
    layer = residual_linear(linear(), 16, 8)
    before = dense_weight(layer)
    nn.Sequential(layer).to(torch.bfloat16)
    assert layer.qsvft_s.dtype == torch.float32
    torch.testing.assert_close(dense_weight(layer), before, rtol=0, atol=0)


@pytest.mark.anywhere
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_with_M_at_zero_it_is_its_base_bit_for_bit_and_close_to_the_original_model(llama, options):
    original = logits(load(llama, torch.float32))
    nf4 = logits(qsvft.quantize(load(llama, torch.float32), 4))
    model = qsvft.prepare(load(llama, torch.float32), bits=4, **options)
    assert all(isinstance(layer.base_layer, ResidualLinear) for layer in layers(model))
    ours = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), ours)
    assert (ours - original).norm() < (nf4 - original).norm()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_adapter_is_U_M_V_on_the_residual_base(llama, options):
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, **options), scale=0.3)
    layer = layers(model)[3]
    x = torch.randn(4, layer.in_features)
    M = layer.units["default"] * layer.pattern("default").dense(layer.M("default").detach().double())
    U, V = (layer.base_layer.basis(side).dense(torch.float64) for side in "UV")
    W = dense_weight(layer.base_layer).double() + U.T @ M @ V
    torch.testing.assert_close(layer(x).double(), x.double() @ W.T, rtol=1e-4, atol=1e-4)


def test_h_is_computed_once_for_base_and_adapter(llama, monkeypatch):
    model = qsvft.prepare(load(llama), bits=4, **OPTIONS)
    layer, calls = layers(model)[0], []
    V = layer.base_layer.basis("V")
    assert layer.basis(layer.forms["default"].inward) is V
    original = type(V).to_coefficients
    monkeypatch.setattr(type(V), "to_coefficients", lambda self, a, k: calls.append(k) or original(self, a, k))
    layer(torch.randn(2, 64).bfloat16())
    assert calls == [64]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_gradients_are_autograds_through_the_dense_weight(llama, options):
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, **options), scale=0.3)
    layer = layers(model)[-1]
    x = torch.randn(5, layer.in_features)
    g = torch.randn(5, layer.out_features)
    (found,) = torch.autograd.grad(layer(x), layer.M("default"), g)
    values = layer.M("default").detach().double().requires_grad_()
    U, V = (layer.base_layer.basis(side).dense(torch.float64) for side in "UV")
    M = layer.units["default"] * layer.pattern("default").dense(values)
    (exact,) = torch.autograd.grad(x.double() @ (U.T @ M @ V).T, values, g.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_adapter_merged_and_reloaded_models_agree(llama, tmp_path, options):
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, **options))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama, torch.float32), tmp_path)
    assert torch.equal(logits(again), expected) and same_tensors(coefficients(again), coefficients(model))
    merged = model.merge_and_unload()
    assert not any(isinstance(m, (QSVFTLinear, ResidualLinear)) for m in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_unloading_leaves_the_residual_base_and_dequantising_makes_it_dense(llama):
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, **OPTIONS))
    with model.disable_adapter():
        expected = logits(model)
    base = model.unload()
    assert torch.equal(logits(base), expected)
    dense = dequantize(base)
    assert not any(isinstance(m, ResidualLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)


def test_it_trains_with_checkpointing_and_autocast(llama):
    model = qsvft.prepare(load(llama), bits=4, **OPTIONS).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(p.grad.any() and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_a_base_that_is_quantised_already_is_refused_by_name(llama):
    with pytest.raises(ValueError, match=r"q_proj: residual=True needs the dense weight, found a .*Linear4bit"):
        qsvft.prepare(qsvft.quantize(load(llama), 4), bits=4, **OPTIONS)


@pytest.mark.parametrize("bits", [8, 16])
def test_other_bits_are_refused_before_anything_changes(llama, bits):
    model = load(llama)
    with pytest.raises(ValueError, match=rf"residual=True with bits={bits}; expected bits=4"):
        qsvft.prepare(model, bits=bits, **OPTIONS)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_an_adapter_for_another_residual_base_is_refused(llama):
    model = qsvft.prepare(load(llama), bits=4, **OPTIONS)
    with pytest.raises(ValueError, match=r"its residual base has rank 64 and factor_bits=16, the new adapter asks for"):
        model.add_adapter("other", qsvft.QSVFTConfig(**{**OPTIONS, "rank": 16}))


def test_bitsandbytes_may_not_repack_the_residual(llama):
    """In an eval forward on some CPUs it would, in place, after which the weight reads as garbage."""
    model = qsvft.prepare(load(llama), bits=4, **OPTIONS)
    assert not any(layer.base_layer.residual.support_avx512bf16_for_cpu for layer in layers(model))
