"""W = U S Vᵀ in fp64, the same vectors and the same signs however they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsvft.maths import decomposition
from qsvft.maths.decomposition import (
    EXACT,
    Decomposer,
    chosen_method,
    decompose,
    sign_reference,
    small_side,
)

FLOAT32 = Decomposer(dtype=torch.float32)

SHAPES = pytest.mark.parametrize(("m", "n"), [(40, 40), (61, 40), (40, 75), (1, 9), (9, 1), (1, 1)])


def make_weight(m: int, n: int, seed: int = 0) -> Tensor:
    """A weight with well separated singular values, so that its singular vectors are determined."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))[0]
    return (left * torch.linspace(3, 0.5, k, dtype=torch.float64)) @ right.T


def small_factor(weight: Tensor, rank: int, sides: str = "one") -> Tensor:
    parts = decompose(weight, rank, sides)
    return parts.V if small_side(weight.shape) == "input" else parts.U


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def identity(k: int) -> Tensor:
    return torch.eye(k, dtype=torch.float64)


@SHAPES
def test_both_factors_rebuild_the_weight(m, n):
    W = make_weight(m, n)
    parts = decompose(W, min(m, n), "both")
    close((parts.U.T * parts.s) @ parts.V, W)


@SHAPES
def test_one_factor_rebuilds_the_weight_through_the_weight(m, n):
    """W V Vᵀ = W, or U Uᵀ W = W: at full rank nothing of W lies outside the small side."""
    W = make_weight(m, n)
    factor = small_factor(W, min(m, n))
    close(W @ factor.T @ factor if small_side(W.shape) == "input" else factor.T @ factor @ W, W)


@SHAPES
@pytest.mark.parametrize("sides", ["one", "both"])
def test_vectors_are_orthonormal_rows_in_fp64(m, n, sides):
    parts = decompose(make_weight(m, n), min(m, n), sides)
    for factor in (parts.U, parts.V):
        if factor is not None:
            assert factor.dtype == torch.float64 and factor.is_contiguous()
            close(factor @ factor.T, identity(min(m, n)))


@SHAPES
@pytest.mark.parametrize("sides", ["one", "both"])
def test_singular_values_descend_and_are_the_weights(m, n, sides):
    W = make_weight(m, n)
    s = decompose(W, min(m, n), sides).s
    assert bool((s.diff() <= 0).all())
    close(s, torch.from_numpy(np.linalg.svd(W.numpy(), compute_uv=False)))


def test_one_sided_holds_the_factor_of_the_smaller_side_alone():
    tall, wide = decompose(make_weight(20, 10), 4), decompose(make_weight(10, 20), 4)
    assert tall.U is None and tall.V.shape == (4, 10)
    assert wide.V is None and wide.U.shape == (4, 10)
    assert small_side((10, 10)) == "input"


@SHAPES
def test_one_and_both_sides_give_the_same_vectors_with_the_same_signs(m, n):
    W = make_weight(m, n)
    close(small_factor(W, min(m, n), "one"), small_factor(W, min(m, n), "both"))
    close(decompose(W, min(m, n), "one").s, decompose(W, min(m, n), "both").s)


@SHAPES
@pytest.mark.parametrize("sides", ["one", "both"])
def test_signs_follow_the_rule_on_the_small_side(m, n, sides):
    factor = small_factor(make_weight(m, n), min(m, n), sides)
    w = torch.tensor([((i + 1) * 0.6180339887498949) % 1 - 0.375 for i in range(factor.shape[1])], dtype=torch.float64)
    assert bool((factor @ w > 0).all())


@pytest.mark.parametrize(("m", "n"), [(40, 40), (61, 40), (40, 75)])
@pytest.mark.parametrize("sides", ["one", "both"])
def test_vectors_are_those_of_an_independent_computation_up_to_a_sign_and_then_the_rule(m, n, sides):
    W = make_weight(m, n)
    left, _, right = np.linalg.svd(W.numpy(), full_matrices=False)
    independent = torch.from_numpy(right if small_side(W.shape) == "input" else left.T)
    turned = independent * torch.sign(independent @ sign_reference(independent.shape[1])).unsqueeze(1)
    close(small_factor(W, min(m, n), sides), turned)


@pytest.mark.parametrize("sides", ["one", "both"])
def test_one_and_two_threads_give_the_same_vectors(sides):
    W = make_weight(130, 120)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(small_factor(W, 120, sides))
    finally:
        torch.set_num_threads(threads)
    close(*found)


@pytest.mark.parametrize("sides", ["one", "both"])
def test_a_last_bit_of_the_weight_turns_no_vector(sides):
    W = make_weight(40, 40)
    noise = torch.randn(W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(small_factor(W * (1 + 1e-15 * noise), 40, sides), small_factor(W, 40, sides))


@pytest.mark.parametrize("sides", ["one", "both"])
def test_negating_or_scaling_the_weight_keeps_the_small_factor(sides):
    W = make_weight(30, 20)
    close(small_factor(-W, 20, sides), small_factor(W, 20, sides))
    close(small_factor(7 * W, 20, sides), small_factor(W, 20, sides))


def test_transposing_the_weight_exchanges_the_factors():
    W = make_weight(30, 20)
    upright, turned = decompose(W, 20, "both"), decompose(W.T, 20, "both")
    close(turned.U, upright.V)
    close(turned.V, upright.U)


@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30)])
def test_a_smaller_rank_is_the_beginning_of_a_larger_one(m, n, sides):
    W = make_weight(m, n)
    whole, first = decompose(W, 20, sides), decompose(W, 7, sides)
    for a, b in ((first.U, whole.U), (first.V, whole.V), (first.s, whole.s)):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b[:7])


@pytest.mark.parametrize("size", [1, 2, 16, 64, 255, 1024])
def test_no_structured_vector_is_orthogonal_to_the_sign_reference(size):
    """One-hot, constant, alternating, ramp and half/half vectors: each is decided far above rounding."""
    index = torch.arange(size, dtype=torch.float64)
    structured = torch.stack(
        [
            torch.ones_like(index),
            1 - 2 * (index % 2),
            index + 1,
            index - (size - 1) / 2 + (size == 1),
            torch.where(index < size / 2, 1.0, -1.0).double(),
        ]
    )
    rows = torch.cat([identity(size), structured / structured.norm(dim=1, keepdim=True)])
    assert float((rows @ sign_reference(size)).abs().min()) > 1e-6


@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("rank_of_W", [0, 1, 7])
def test_rank_deficient_and_zero_weights_give_finite_orthonormal_factors(m, n, rank_of_W, sides):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, rank_of_W, dtype=torch.float64, generator=generator) @ torch.randn(
        rank_of_W, n, dtype=torch.float64, generator=generator
    )
    parts = decompose(W, 20, sides)
    assert bool(torch.isfinite(parts.s).all()) and bool((parts.s >= 0).all())
    assert int((parts.s > 1e-6).sum()) == rank_of_W
    for factor in (parts.U, parts.V):
        if factor is not None:
            close(factor @ factor.T, identity(20))
    if sides == "both":
        close((parts.U.T * parts.s) @ parts.V, W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sides", ["one", "both"])
def test_a_weight_in_low_precision_is_decomposed_as_the_fp64_matrix_it_is(dtype, sides):
    W = make_weight(30, 20).to(dtype)
    assert torch.equal(small_factor(W, 20, sides), small_factor(W.double(), 20, sides))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_any_shape_and_rank_gives_the_best_approximation_of_that_rank(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    W = make_weight(m, n, seed=m * 31 + n)
    parts = decompose(W, rank, "both")
    assert (parts.U.shape, parts.s.shape, parts.V.shape) == ((rank, m), (rank,), (rank, n))
    rest = torch.linalg.matrix_norm(W - (parts.U.T * parts.s) @ parts.V)
    left_out = torch.from_numpy(np.linalg.svd(W.numpy(), compute_uv=False))[rank:]
    close(rest, torch.linalg.vector_norm(left_out))


@pytest.mark.parametrize("rank", [0, -1, 21])
@pytest.mark.parametrize("sides", ["one", "both"])
def test_a_rank_out_of_range_is_refused_with_the_range_and_the_shape(rank, sides):
    with pytest.raises(ValueError, match=rf"\[1, 20\] for a weight of shape \(30, 20\), got {rank}"):
        decompose(make_weight(30, 20), rank, sides)


@pytest.mark.parametrize("method", [EXACT, FLOAT32, Decomposer(randomized=True)], ids=lambda method: method.name)
def test_the_weight_is_not_changed(method):
    W = make_weight(30, 20)
    before = W.clone()
    decompose(W, 20, "one", method)
    decompose(W, 20, "both", method)
    assert torch.equal(W, before)


def with_singular_values(m: int, n: int, s: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(m + n)
    left = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64, generator=generator))[0]
    return (left * s) @ right.T


SPECTRA = {
    "clear": torch.linspace(3, 0.5, 30, dtype=torch.float64),
    "to rounding": torch.logspace(0, -15, 30, dtype=torch.float64),
    "with zeros": torch.cat([torch.linspace(3, 0.5, 20, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)]),
    "tail in a heap": torch.cat([torch.ones(20, dtype=torch.float64), torch.full((10,), 1e-9, dtype=torch.float64)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(30, 30), (90, 30), (30, 41)])
@pytest.mark.parametrize("randomized", [False, True])
def test_both_sides_are_orthonormal_and_rebuild_the_weight_however_ill_conditioned(m, n, spectrum, randomized):
    """Small singular values are what W v_j / s_j alone would lose."""
    W = with_singular_values(m, n, SPECTRA[spectrum])
    parts = decompose(W, 30, "both", Decomposer(randomized))
    for factor in (parts.U, parts.V):
        assert float((factor @ factor.T - identity(30)).abs().max()) < 1e-6
    assert bool((parts.s.diff() <= 0).all())
    assert float(torch.linalg.matrix_norm((parts.U.T * parts.s) @ parts.V - W)) < 1e-12
    torch.testing.assert_close(parts.s, torch.linalg.svdvals(W), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(40, 40), (61, 40), (40, 75), (90, 40)])
def test_both_sides_are_those_of_the_svd(m, n):
    W = make_weight(m, n)
    parts = decompose(W, 40, "both")
    left, s, right = (torch.from_numpy(a) for a in np.linalg.svd(W.numpy(), full_matrices=False))
    signs = torch.sign((parts.V * right).sum(1, keepdim=True))
    close(parts.s, s)
    close(parts.V, right * signs)
    close(parts.U, left.T * signs)


@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize(("m", "n"), [(61, 40), (40, 75)])
@pytest.mark.parametrize("randomized", [False, True])
def test_the_length_of_a_stretch_does_not_matter(monkeypatch, m, n, sides, randomized):
    W, whole = make_weight(m, n), None
    for entries in (10_000, 300, 1):
        monkeypatch.setattr(decomposition.stretches, "__defaults__", (torch.float64, entries))
        parts = decompose(W, 12, sides, Decomposer(randomized))
        if whole is not None:
            for a, b in ((parts.U, whole.U), (parts.V, whole.V), (parts.s, whole.s)):
                assert (a is None) == (b is None)
                if a is not None:
                    close(a, b)
        whole = parts


@pytest.mark.parametrize("randomized", [False, True])
@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize(("m", "n"), [(40, 40), (61, 40), (40, 75), (90, 40)])
def test_in_fp32_the_vectors_are_fp32_and_those_of_fp64_to_its_rounding(m, n, sides, randomized):
    W = make_weight(m, n)
    parts, exact = decompose(W, 20, sides, Decomposer(randomized, torch.float32)), decompose(W, 20, sides)
    for found, expected in ((parts.U, exact.U), (parts.V, exact.V), (parts.s, exact.s)):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    for factor in (parts.U, parts.V):
        if factor is not None:
            assert float((factor @ factor.T - torch.eye(20)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("limit", "rank", "randomized"),
    [(1024, 128, True), (1024, 129, False), (1023, 16, False), (4096, 512, True), (4096, 4096, False), (64, 1, False)],
)
def test_auto_is_randomized_for_a_small_rank_of_a_large_matrix(limit, rank, randomized):
    assert chosen_method(limit, rank, "auto") == Decomposer(randomized)
    assert chosen_method(limit, rank, "float32") == Decomposer(randomized, torch.float32)
    assert chosen_method(limit, rank, "exact") == EXACT
    assert chosen_method(limit, rank, "randomized") == Decomposer(True)


def test_each_method_has_a_name_of_its_own():
    methods = [
        Decomposer(randomized, dtype) for randomized in (False, True) for dtype in (torch.float64, torch.float32)
    ]
    assert {method.name for method in methods} == {"exact", "randomized", "float32", "float32, randomized"}


def test_an_unknown_decomposition_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of 'auto', 'exact', 'randomized', 'float32', got 'svd'"):
        chosen_method(64, 8, "svd")
