"""The update of a dense M in one node of the graph: the numbers of the products one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsvft.maths.dense_coefficients import dense_gradient
from qsvft.maths.dense_update import dense_update
from qsvft.maths.patterns import DensePattern
from qsvft.maths.updates import sparse_update, two_sided_update
from qsvft.storage.factors import StoredBasis
from qsvft.storage.stored_matrix import StoredMatrix

TOKENS, OUTPUTS, INPUTS, RANK = 37, 48, 64, 24


def problem(dtype: torch.dtype, bits: int = 16) -> tuple[StoredBasis, StoredBasis, list[Tensor]]:
    """U, V, and base, a and M that ask for gradients."""
    generator = torch.Generator().manual_seed(bits)
    U, V = (
        StoredBasis(StoredMatrix.hold(torch.randn(RANK, size, generator=generator) / size**0.5, bits))
        for size in (OUTPUTS, INPUTS)
    )
    shapes = ((TOKENS, OUTPUTS), (TOKENS, INPUTS), (RANK * RANK,))
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    dtypes = (dtype, dtype, torch.promote_types(dtype, torch.float32))
    return U, V, [t.to(d).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_it_is_the_general_update_with_its_gradients(bits, scale):
    U, V, (base, a, values) = problem(torch.float64, bits)
    one = two_sided_update(base, a, U, V, values, DensePattern(RANK), scale)
    assert type(one.grad_fn).__name__ == "ViewBackward0"
    assert type(one.grad_fn.next_functions[0][0]).__name__ == "_DenseUpdateBackward"
    many = sparse_update(base, a, V, U, values, DensePattern(RANK), scale)
    for found, expected in zip(*(with_gradients(y, [base, a, values]) for y in (one, many)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_with_M_at_zero_it_is_the_base_bit_for_bit(dtype):
    U, V, (base, a, values) = problem(dtype)
    y = two_sided_update(base, a, U, V, torch.zeros_like(values), DensePattern(RANK), 2.0)
    assert y.dtype == dtype and torch.equal(y, base)


@torch.no_grad()
def test_a_base_in_another_dtype_keeps_it():
    U, V, (_, a, values) = problem(torch.bfloat16)
    base, M = torch.randn(TOKENS, OUTPUTS), values.double().view(RANK, RANK)
    y = two_sided_update(base, a, U, V, values, DensePattern(RANK), 0.5)
    update = 0.5 * a.double() @ V.dense(torch.float64).T @ M.T @ U.dense(torch.float64)
    assert y.dtype == torch.float32
    assert float((y.double() - base.double() - update).norm()) < 1e-2 * float(update.norm())


def test_for_the_backward_it_keeps_h_and_M_alone():
    U, V, (base, a, values) = problem(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        dense_update(base, a, values, 1.0, V.held(RANK), U.held(RANK))
    assert [tuple(t.shape) for t in kept] == [(TOKENS, RANK), (RANK * RANK,)]
    assert kept[1] is values


@pytest.mark.parametrize("given_back", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
def test_it_is_differentiable_twice(monkeypatch, given_back, bits):
    monkeypatch.setattr("qsvft.storage.stored_matrix.SLICE_BYTES", 1)  # a stretch at a time
    U, V, _ = problem(torch.float64, bits)
    rank, tokens = 3, 2
    error = StoredBasis(StoredMatrix.hold(torch.randn(RANK, OUTPUTS) / 8, bits)).held(rank) if given_back else None
    generator = torch.Generator().manual_seed(1)
    base, a, values = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((tokens, OUTPUTS), (tokens, INPUTS), (rank * rank,))
    )

    def update(base: Tensor, a: Tensor, values: Tensor) -> Tensor:
        return dense_update(base, a, values, 0.7, V.held(rank), U.held(rank), error)

    assert torch.autograd.gradcheck(update, (base, a, values))
    assert torch.autograd.gradgradcheck(update, (base, a, values))
    assert torch.autograd.gradgradcheck(lambda *given: update(*given).square(), (base, a, values))


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 3000])
def test_the_gradient_of_M_is_summed_in_fp32(tokens, monkeypatch):
    """Low precision rounds a stretch of tokens, and never the sum over all of them."""
    generator = torch.Generator().manual_seed(tokens)
    g, h = (torch.randn(tokens, RANK, generator=generator).add_(0.5).bfloat16() for _ in range(2))
    exact = g.double().T @ h.double()
    found = dense_gradient(g, h)
    assert found.dtype == torch.float32
    assert float((found.double() - exact).norm()) < 2e-3 * float(exact.norm())
    monkeypatch.setattr("qsvft.maths.dense_coefficients._ENTRIES", 1)  # a stretch at a time
    torch.testing.assert_close(dense_gradient(g, h), found, rtol=1e-5, atol=1e-5 * float(exact.norm()))
