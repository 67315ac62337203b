"""Lean norms: the same bits forward and backward, and nothing kept but the input."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from small_models import load, logits, tokens
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import qsvft
from qsvft.lean import by_tiles
from qsvft.lean.norms import lean_norms, plain_norms

NORMS = [LlamaRMSNorm, GemmaRMSNorm, nn.LayerNorm, nn.RMSNorm]


def norm_of(kind, size: int = 64, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    norm = kind(size)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    return norm.to(dtype).requires_grad_(False)


def output_gradient_and_kept(norm: nn.Module, x: torch.Tensor):
    leaf, kept = x.clone().requires_grad_(), []
    inner = leaf * 1
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(inner)
    (gradient,) = torch.autograd.grad(
        y, leaf, torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view(y.shape)
    )
    return y.detach(), gradient, [t for t in kept if t.data_ptr() != inner.data_ptr() and t.numel() >= x.numel()]


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_outputs_and_gradients_are_the_same_bits_and_only_the_input_is_kept(kind, dtype):
    norm, x = norm_of(kind, dtype=dtype), torch.randn(5, 64).to(dtype)
    y, gradient, _ = output_gradient_and_kept(norm, x)
    lean_y, lean_gradient, kept = output_gradient_and_kept(lean_norms(nn.Sequential(norm))[0], x)
    assert torch.equal(lean_y, y) and torch.equal(lean_gradient, gradient)
    assert kept == []


class LargestInFp32(TorchDispatchMode):
    """The most rows that one operation gave in fp32."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.dim() > 1 and out.shape[-1] > 1:
            self.rows = max(self.rows, out[..., 0].numel())
        return out


@pytest.mark.parametrize("shape", [(1, 29, 64), (3, 11, 64), (29, 64)])
def test_of_a_long_sequence_a_tile_alone_stands_there_in_fp32_forward_and_backward(shape, monkeypatch):
    monkeypatch.setattr(by_tiles, "TOKENS", 8)
    norm, x = norm_of(LlamaRMSNorm), torch.randn(shape).bfloat16()
    y, gradient, _ = output_gradient_and_kept(norm, x)
    with LargestInFp32() as largest:
        lean_y, lean_gradient, kept = output_gradient_and_kept(lean_norms(nn.Sequential(norm))[0], x)
    assert torch.equal(lean_y, y) and torch.equal(lean_gradient, gradient) and kept == []
    assert 0 < largest.rows <= 8


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_they_are_differentiable_twice(kind):
    def curvature(norm: nn.Module) -> torch.Tensor:
        leaf = torch.linspace(-1, 2, 128).view(2, 64).requires_grad_()
        (first,) = torch.autograd.grad(norm(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    norm = norm_of(kind, dtype=torch.float32)
    expected = curvature(norm)
    torch.testing.assert_close(curvature(lean_norms(nn.Sequential(norm))[0]), expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1


def test_an_rms_norm_of_transformers_keeps_more_without():
    *_, kept = output_gradient_and_kept(norm_of(LlamaRMSNorm), torch.randn(5, 64).bfloat16())
    assert any(t.dtype == torch.float32 for t in kept)


def test_under_autocast_the_recomputation_runs_under_it_too():
    norm, x = norm_of(nn.LayerNorm, dtype=torch.float32), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y, gradient, _ = output_gradient_and_kept(norm, x)
        lean_y, lean_gradient, _ = output_gradient_and_kept(lean_norms(nn.Sequential(norm))[0], x)
    assert torch.equal(lean_y, y) and torch.equal(lean_gradient, gradient)


def test_a_norm_that_trains_gets_its_gradient_as_before():
    norm = lean_norms(nn.Sequential(norm_of(LlamaRMSNorm).requires_grad_(True)))[0]
    norm(torch.randn(5, 64).bfloat16()).sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.any()


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_prepared_model_has_the_same_loss_and_gradients_with_plain_norms(llama, checkpointing):
    model = qsvft.prepare(load(llama), bits=4, gradient_checkpointing=checkpointing).train()
    lean = loss_and_gradients(model)
    plain = loss_and_gradients(plain_norms(model))
    assert all(torch.equal(lean[name], plain[name]) for name in plain)


def test_the_model_keeps_its_names_copies_pickles_saves_and_is_freed(llama, tmp_path):
    model = lean_norms(load(llama))
    norm = model.model.norm
    assert type(norm).__name__ == "LlamaRMSNorm" and isinstance(norm, LlamaRMSNorm) and type(norm) is not LlamaRMSNorm
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is type(norm) and torch.equal(other.weight, norm.weight) and other.weight is not norm.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(again.model.norm) is LlamaRMSNorm and torch.equal(logits(again), logits(model))
    assert type(plain_norms(model).model.norm) is LlamaRMSNorm
    reference = weakref.ref(lean_norms(model).model.norm)
    gc.collect()
    gc.disable()
    try:
        del model, norm, other, again
        assert reference() is None
    finally:
        gc.enable()
