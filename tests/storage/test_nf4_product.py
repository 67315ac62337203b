"""The sliced 4-bit product: bitsandbytes' numbers, without the dense weight."""

from __future__ import annotations

import pickle

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from qsvft import quantize
from qsvft.memory.ledger import Ledger
from qsvft.storage import nf4_product
from qsvft.storage.nf4_product import SlicedLinear4bit, block_maxima, slice_products

SHAPES = pytest.mark.parametrize(("m", "n"), [(192, 128), (128, 320), (200, 64)])


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of a few rows, so that small layers are sliced too."""
    monkeypatch.setattr(nf4_product, "DENSE_BYTES", 4096)
    monkeypatch.setattr(nf4_product, "LEAST_TOKENS", 1)


def layer_of(m: int, n: int, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(m + n)
    return quantize(nn.Sequential(nn.Linear(n, m, bias=bias).to(dtype)), 4, progress=False)[0].train()


def output_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), gradient


@SHAPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_outputs_and_gradients_are_bitsandbytes_to_rounding(small_slices, m, n, bias, dtype):
    layer, x = layer_of(m, n, bias, dtype), torch.randn(3, 7, n).to(dtype)
    expected = output_and_gradient(layer, x)
    found = output_and_gradient(slice_products(layer), x)
    assert type(layer) is SlicedLinear4bit
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-3 * float(b.abs().max()))


@SHAPES
def test_it_is_differentiable_twice(small_slices, m, n):
    layer, x = slice_products(layer_of(m, n, dtype=torch.float32)), torch.randn(3, n)
    W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    def curvature(product) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(product(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    expected = curvature(lambda x: x @ W.T + layer.bias)
    torch.testing.assert_close(curvature(layer), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@SHAPES
def test_the_errors_are_no_larger_than_those_of_one_dense_product(small_slices, m, n):
    layer, x = slice_products(layer_of(m, n)), torch.randn(40, n).bfloat16()
    W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    y, gradient = output_and_gradient(layer, x)
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    for ours, naive, exact in (
        (y, x @ W.T + layer.bias, x.double() @ W.double().T + layer.bias.double()),
        (gradient, g @ W, g.double() @ W.double()),
    ):
        assert (ours.double() - exact).norm() <= 1.05 * (naive.double() - exact).norm()


@SHAPES
def test_the_blocks_maxima_are_those_that_bitsandbytes_dequantises_with(m, n):
    state = layer_of(m, n).weight.quant_state
    flat = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(block_maxima(state), flat)


@pytest.mark.parametrize(("m", "n"), [(4096, 11008), (14336, 4096)])
def test_the_dense_weight_never_stands_there(m, n):
    """On meta, under the ledger: temporaries stay at a slice, its codes and the blocks' maxima."""
    from qsvft.storage.nf4 import empty_nf4_linear

    with torch.device("meta"):
        layer = empty_nf4_linear(nn.Linear(n, m, bias=False, dtype=torch.bfloat16))
        x = torch.empty(256, n, dtype=torch.bfloat16, requires_grad=True)
    ledger = Ledger()
    with ledger:
        ledger.phase = "forward"
        slice_products(layer)(x).backward(torch.empty(256, m, dtype=torch.bfloat16, device="meta"))
    results = 2 * 256 * (2 * m + 2 * n) + 2 * 256 * n
    maxima = 4 * m * n // 64 * 2
    assert ledger.high_water() < results + maxima + 2 * nf4_product.DENSE_BYTES
    assert ledger.high_water() < 2 * m * n


def test_without_gradients_or_with_few_tokens_it_is_bitsandbytes_own_forward(monkeypatch):
    layer = slice_products(layer_of(64, 64))
    monkeypatch.setattr(nf4_product._SlicedProduct, "apply", lambda *_: pytest.fail("sliced"))
    with torch.no_grad():
        layer(torch.randn(500, 64).bfloat16())
    layer(torch.randn(5, 64).bfloat16().requires_grad_())


def test_only_bitsandbytes_own_layer_is_taken_over():
    plain = nn.Linear(4, 4)
    assert type(slice_products(plain)) is nn.Linear
    layer = slice_products(layer_of(64, 64))
    assert isinstance(layer, bnb.nn.Linear4bit) and slice_products(layer) is layer
    assert type(pickle.loads(pickle.dumps(layer))) is SlicedLinear4bit
