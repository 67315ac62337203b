"""What is held beside a weight: the right sides, rounded, with the scale of the rounded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsvft.maths.decomposition import decompose
from qsvft.maths.patterns import plain
from qsvft.maths.updates import TAIL_DAMPING, bounded_inverse, input_side_update, output_side_update
from qsvft.storage.factors import StoredBasis, make_bases, measured_scale, needed_sides
from qsvft.storage.stored_matrix import StoredMatrix

SHAPES = pytest.mark.parametrize(("m", "n"), [(40, 40), (61, 40), (40, 75)])
BITS = pytest.mark.parametrize("bits", [16, 8, 4])


def make_weight(m: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m + n + seed)).to(dtype)


def small(m: int, n: int) -> str:
    return "V" if n <= m else "U"


def one_sided(W: Tensor, rank: int, bits: int = 16) -> tuple[StoredBasis, Tensor, Tensor]:
    """The small side's basis, its scale and rms."""
    side = small(*W.shape)
    basis = make_bases(W, rank, "one", bits)[side]
    return basis, *measured_scale(W, basis, side, rank)


def lengths(W: Tensor, rows: Tensor) -> Tensor:
    """|W v_j|, or |Wᵀ u_j| for a wide weight, in fp64."""
    product = W.double() if W.shape[1] <= W.shape[0] else W.double().T
    return torch.linalg.vector_norm(product @ rows.double().T, dim=0)


def test_two_sided_needs_both_factors_and_one_sided_the_smaller_one():
    assert needed_sides("both", (5, 9)) == needed_sides("both", (9, 5)) == (True, True)
    assert needed_sides("one", (5, 9)) == (True, False)
    assert needed_sides("one", (9, 5)) == needed_sides("one", (5, 5)) == (False, True)


@SHAPES
@BITS
@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exactly_the_needed_factors_are_held_in_the_bits_asked_for(m, n, bits, sides, dtype):
    W = make_weight(m, n, dtype)
    bases = make_bases(W, 30, sides, bits)
    needs = needed_sides(sides, (m, n))
    assert set(bases) == {side for side, needed in zip("UV", needs, strict=True) if needed}
    for side, basis in bases.items():
        assert (basis.rank, basis.size) == (30, m if side == "U" else n)
        assert basis.stored.bits == bits
        s, rms = measured_scale(W, basis, side, 30)
        assert s.shape == (30,) and s.dtype == rms.dtype == torch.float32 and rms.ndim == 0


@BITS
@pytest.mark.parametrize(("m", "n"), [(400, 320), (320, 400)])
def test_lengths_are_those_in_fp64_rounded_once(m, n, bits):
    """But for those that lie so near the middle between two numbers that sums in another order differ."""
    W = make_weight(m, n)
    basis, s, rms = one_sided(W, 256, bits)
    assert float((s == lengths(W, basis.dense(torch.float32)).float()).double().mean()) > 0.99
    assert float(rms) == pytest.approx(float(W.double().norm() / min(m, n) ** 0.5), rel=1e-7)


@SHAPES
@BITS
@pytest.mark.parametrize("sides", ["one", "both"])
def test_factors_are_the_decomposition_rounded_once(m, n, sides, bits):
    W = make_weight(m, n)
    bases, exact = make_bases(W, 30, sides, bits), decompose(W, 30, sides)
    for side, basis in bases.items():
        assert torch.equal(basis.dense(torch.bfloat16), StoredMatrix.hold(getattr(exact, side), bits).dense())


@SHAPES
@BITS
def test_s_is_the_length_of_W_times_the_rounded_vector(m, n, bits):
    W = make_weight(m, n)
    basis, s, rms = one_sided(W, 40, bits)
    torch.testing.assert_close(s, lengths(W, basis.dense(torch.float64)).float(), rtol=1e-6, atol=1e-6 * float(rms))


@SHAPES
@BITS
def test_the_scale_of_the_rounded_vectors_is_more_exact_than_the_singular_value(m, n, bits):
    """Applied with 1/s of the rounded vectors each direction W v_j / s_j has length one; with 1/s_j it has not."""
    W = make_weight(m, n)
    basis, s, rms = one_sided(W, 40, bits)
    found = lengths(W, basis.dense(torch.float64))
    ours, theirs = ((found - scale.double()).abs().max() / rms for scale in (s, decompose(W, 40, "one").s))
    assert float(ours) < 1e-6 < 1e-4 < float(theirs)


@SHAPES
@pytest.mark.parametrize("rank", [1, 17, 40])
def test_rms_is_that_of_all_singular_values_whatever_the_rank(m, n, rank):
    W = make_weight(m, n)
    everything = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(one_sided(W, rank)[2], everything.square().mean().sqrt().float())


@SHAPES
def test_one_and_both_sides_hold_the_same_small_factor(m, n):
    W, side = make_weight(m, n), small(m, n)
    one, both = (make_bases(W, 12, sides, 16)[side].dense(torch.float32) for sides in ("one", "both"))
    torch.testing.assert_close(one, both)


@SHAPES
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e12])
@BITS
def test_zero_tiny_and_huge_weights_give_finite_factors_and_updates(m, n, bits, size):
    W = make_weight(m, n) * size
    basis, s, rms = one_sided(W, 30, bits)
    scale = bounded_inverse(s, rms)
    assert bool(torch.isfinite(scale).all()) and bool(torch.isfinite(basis.dense(torch.float32)).all())
    x, M = torch.randn(4, min(m, n)), torch.ones(30)
    update = input_side_update if n <= m else output_side_update
    assert bool(torch.isfinite(update(x, x, basis, scale, M, plain(30))).all())


@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30)])
def test_a_rank_deficient_weight_gives_a_scale_that_the_damping_bounds(m, n):
    _, s, rms = one_sided(torch.outer(torch.randn(m), torch.randn(n)), 20)
    scale = bounded_inverse(s, rms)
    assert bool(torch.isfinite(scale).all())
    assert float(scale.max()) <= float(1 / (TAIL_DAMPING * rms)) * (1 + 1e-6)


@BITS
@pytest.mark.parametrize("sides", ["one", "both"])
def test_making_factors_again_gives_the_same_bits(sides, bits):
    W = make_weight(61, 40)
    first, second = make_bases(W, 40, sides, bits), make_bases(W.clone(), 40, sides, bits)
    for side in first:
        for a, b in zip(first[side].stored.parts(), second[side].stored.parts(), strict=True):
            assert torch.equal(a, b)


@BITS
def test_a_longer_basis_adds_directions_and_leaves_those_held_as_they_are(bits):
    W = make_weight(61, 40)
    basis, whole = make_bases(W, 7, "one", bits)["V"], make_bases(W, 33, "one", bits)["V"]
    before = basis.dense(torch.float32)
    basis.extend(whole)
    assert basis.rank == 33
    assert torch.equal(basis.dense(torch.float32, 7), before)
    assert torch.equal(basis.dense(torch.float32)[7:], whole.dense(torch.float32)[7:])
