"""What is held beside a weight: the right sides, rounded, with the scale of the rounded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsvft.decomposition import decompose
from qsvft.factors import Factors, hold, make_factors, needed_sides
from qsvft.functional import bounded_inverse, input_side_update, output_side_update
from qsvft.patterns import plain

SHAPES = pytest.mark.parametrize(("m", "n"), [(40, 40), (61, 40), (40, 75)])


def make_weight(m: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m + n)).to(dtype)


def held(factors: Factors) -> list[Tensor]:
    return [t for t in (factors.U, factors.V, factors.s, factors.rms) if t is not None]


def test_two_sided_needs_both_factors_and_one_sided_the_smaller_one():
    assert needed_sides("both", (5, 9)) == needed_sides("both", (9, 5)) == (True, True)
    assert needed_sides("one", (5, 9)) == (True, False)
    assert needed_sides("one", (9, 5)) == needed_sides("one", (5, 5)) == (False, True)


@SHAPES
@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exactly_the_needed_factors_are_held_in_bf16_and_the_scales_in_fp32(m, n, sides, dtype):
    factors = make_factors(make_weight(m, n, dtype), 30, sides)
    assert (factors.U is not None, factors.V is not None) == needed_sides(sides, (m, n))
    if factors.U is not None:
        assert factors.U.shape == (30, m) and factors.U.dtype == torch.bfloat16
    if factors.V is not None:
        assert factors.V.shape == (30, n) and factors.V.dtype == torch.bfloat16
    assert factors.s.shape == (30,) and factors.s.dtype == factors.rms.dtype == torch.float32
    assert factors.rms.ndim == 0


@SHAPES
@pytest.mark.parametrize("sides", ["one", "both"])
def test_factors_are_the_decomposition_rounded_once(m, n, sides):
    W = make_weight(m, n)
    factors, exact = make_factors(W, 30, sides), decompose(W, 30, sides)
    for rounded, vectors in ((factors.U, exact.U), (factors.V, exact.V)):
        if rounded is not None:
            assert torch.equal(rounded, vectors.bfloat16())


@SHAPES
@pytest.mark.parametrize("sides", ["one", "both"])
def test_s_is_the_length_of_W_times_the_rounded_small_vector(m, n, sides):
    W = make_weight(m, n)
    factors = make_factors(W, 40, sides)
    products = W.double() @ factors.V.double().T if n <= m else W.double().T @ factors.U.double().T
    expected = torch.linalg.vector_norm(products, dim=0).float()
    torch.testing.assert_close(factors.s, expected, rtol=1e-6, atol=0)


@SHAPES
def test_the_scale_of_the_rounded_vectors_is_more_exact_than_the_singular_value(m, n):
    """Applied with 1/s of the rounded vectors each direction W v_j / s_j has length one; with 1/s_j it has not."""
    W = make_weight(m, n)
    factors, exact = make_factors(W, 40, "one"), decompose(W, 40, "one")
    products = W.double() @ factors.V.double().T if n <= m else W.double().T @ factors.U.double().T
    lengths = torch.linalg.vector_norm(products, dim=0)
    ours, theirs = ((lengths / s.double() - 1).abs().max() for s in (factors.s, exact.s))
    assert float(ours) < 1e-6 < float(theirs)


@SHAPES
@pytest.mark.parametrize("rank", [1, 17, 40])
def test_rms_is_that_of_all_singular_values_whatever_the_rank(m, n, rank):
    W = make_weight(m, n)
    everything = torch.linalg.svdvals(W.double())
    expected = everything.square().mean().sqrt().float()
    torch.testing.assert_close(make_factors(W, rank, "one").rms, expected)


@SHAPES
def test_one_and_both_sides_hold_the_same_small_factor_and_scale(m, n):
    one, both = make_factors(make_weight(m, n), 12, "one"), make_factors(make_weight(m, n), 12, "both")
    small = "V" if n <= m else "U"
    torch.testing.assert_close(getattr(one, small), getattr(both, small))
    torch.testing.assert_close(one.s, both.s)
    assert torch.equal(one.rms, both.rms)


@SHAPES
@pytest.mark.parametrize("sides", ["one", "both"])
def test_bytes_are_those_of_the_tensors_held(m, n, sides):
    factors = make_factors(make_weight(m, n), 12, sides)
    assert factors.nbytes == sum(t.untyped_storage().nbytes() for t in held(factors))


@SHAPES
@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e12])
def test_zero_tiny_and_huge_weights_give_finite_factors_and_updates(m, n, sides, tau, size):
    factors = make_factors(make_weight(m, n) * size, 30, sides)
    assert all(bool(torch.isfinite(t).all()) for t in held(factors))
    scale = bounded_inverse(factors.s, factors.rms, tau)
    x, M = torch.randn(4, min(m, n)), torch.ones(30)
    update, factor = (input_side_update, factors.V) if n <= m else (output_side_update, factors.U)
    assert bool(torch.isfinite(update(x, x, factor, scale, M, plain(30))).all())


@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30)])
def test_a_rank_deficient_weight_gives_a_scale_that_the_damping_bounds(m, n):
    W = torch.outer(torch.randn(m), torch.randn(n))
    factors = make_factors(W, 20, "one")
    scale = bounded_inverse(factors.s, factors.rms, 0.1)
    assert bool(torch.isfinite(scale).all())
    assert float(scale.max()) <= float(1 / (0.1 * factors.rms)) * (1 + 1e-6)


@pytest.mark.parametrize("sides", ["one", "both"])
def test_making_factors_again_gives_the_same_bits(sides):
    W = make_weight(61, 40)
    for a, b in zip(held(make_factors(W, 40, sides)), held(make_factors(W.clone(), 40, sides)), strict=True):
        assert torch.equal(a, b)


def test_holding_a_decomposition_is_what_making_factors_does():
    W = make_weight(61, 40)
    for a, b in zip(held(hold(decompose(W, 9, "both"), W)), held(make_factors(W, 9, "both")), strict=True):
        assert torch.equal(a, b)
