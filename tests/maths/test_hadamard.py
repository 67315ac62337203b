"""The Hadamard basis: orthonormal, the same on every machine, its two maps each other's transpose."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsvft.maths.hadamard import HadamardBasis, blocks_of, walsh_hadamard

# A power of two, a product, a binary expansion of several blocks, an odd size, the smallest ones.
SIZES = pytest.mark.parametrize("size", [1, 2, 3, 64, 100, 384, 1024])


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@SIZES
def test_directions_are_orthonormal(size):
    F = HadamardBasis(size, size, 0).dense(torch.float64)
    torch.testing.assert_close(F @ F.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1000))
def test_any_size_and_rank_gives_orthonormal_directions(size, seed):
    rank = 1 + seed % size
    F = HadamardBasis(size, rank, seed).dense(torch.float64)
    assert F.shape == (rank, size)
    torch.testing.assert_close(F @ F.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100000))
def test_blocks_are_powers_of_two_that_add_up(size):
    blocks = blocks_of(size)
    assert sum(blocks) == size and blocks == sorted(set(blocks), reverse=True)
    assert all(block & (block - 1) == 0 for block in blocks)


@pytest.mark.parametrize("size", [2, 8, 64, 128, 8192])
def test_the_transform_is_sylvesters_matrix(size):
    """Entry (i, j) is (-1) to the number of bits that i and j share, over sqrt(size)."""
    basis = HadamardBasis(size, size, 0)
    rows = torch.tensor([0, 1, size // 2, size - 1])
    found = walsh_hadamard(torch.eye(size, dtype=torch.float64)[rows], basis.table)
    columns = range(size)
    expected = [[(-1) ** (int(i) & j).bit_count() / size**0.5 for j in columns] for i in rows]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@SIZES
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_maps_are_those_of_the_dense_matrix(size, share):
    rank = max(1, int(share * size))
    basis = HadamardBasis(size, rank, 3)
    F, a, z, base = basis.dense(torch.float64), noise(5, size), noise(5, rank), noise(5, size)
    torch.testing.assert_close(basis.to_coefficients(a, rank), a @ F.T)
    torch.testing.assert_close(basis.from_coefficients(base, z), base + z @ F)


@pytest.mark.parametrize(("size", "rank"), [(12, 12), (12, 5), (8, 8)])
def test_gradients_are_autograds(size, rank):
    basis, base = HadamardBasis(size, rank, 1), noise(3, size)
    a, z = noise(3, size).requires_grad_(), noise(3, rank).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: basis.to_coefficients(a, rank), (a,))
    assert torch.autograd.gradcheck(lambda z: basis.from_coefficients(base, z), (z,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_exact_as_one_rounding_a_factor(dtype):
    """4096 takes two products; each rounds once more than a single dense product would."""
    basis, a = HadamardBasis(4096, 4096, 0), noise(8, 4096, dtype=dtype)
    exact = basis.to_coefficients(a.double(), 4096)
    found = basis.to_coefficients(a, 4096)
    assert found.dtype == dtype
    assert float((found.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


def test_large_activations_do_not_overflow_fp16():
    a = torch.full((1, 4096), 60.0, dtype=torch.float16)
    assert bool(torch.isfinite(HadamardBasis(4096, 4096, 0).to_coefficients(a, 4096)).all())


def test_the_seed_decides_the_signs_in_the_same_way_everywhere():
    signs = HadamardBasis(4096, 4096, 7).signs
    assert torch.equal(signs, HadamardBasis(4096, 4096, 7).signs)
    assert not torch.equal(signs, HadamardBasis(4096, 4096, 8).signs)
    assert set(signs.tolist()) == {1, -1} and abs(int(signs.sum())) < 400
    # Python's Mersenne Twister is the same in every version: an adapter of today must load tomorrow.
    assert hashlib.sha256(signs.numpy().tobytes()).hexdigest().startswith("8b6449aaaa197050")


def test_what_is_held_is_a_few_bytes_and_none_of_it_is_saved():
    basis = HadamardBasis(4096, 4096, 0)
    assert sum(b.numel() * b.element_size() for b in basis.buffers()) == 4096 + 64 * 64
    assert not basis.state_dict()
