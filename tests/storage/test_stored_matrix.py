"""Matrices in 16, 8 and 4 bits: one matrix however it is read, whatever is done to its module."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qsvft.storage.factors import StoredBasis
from qsvft.storage.stored_matrix import BLOCKS, StoredMatrix, dense_rows

BITS = pytest.mark.parametrize("bits", [16, 8, 4])
SHAPES = pytest.mark.parametrize(("rows", "columns"), [(9, 64), (5, 130), (3, 1), (7, 63), (1, 4096)])
# Root mean square error relative to the matrix, for Gaussian entries.
ERROR = {16: 0.004, 8: 0.008, 4: 0.11}


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@BITS
@SHAPES
def test_what_is_held_is_the_matrix_up_to_its_rounding(bits, rows, columns):
    matrix = noise(rows, columns)
    held = StoredMatrix.hold(matrix, bits)
    assert (held.rows, held.columns, held.layout) == (rows, columns, (bits, rows, columns))
    assert held.dense().shape == (rows, columns) and held.dense().dtype == torch.bfloat16
    assert relative(held.dense(), matrix) < ERROR[bits]


@BITS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_every_dtype_reads_the_same_bf16_numbers(bits, dtype):
    held = StoredMatrix.hold(noise(20, 100), bits)
    assert torch.equal(held.dense(dtype), held.dense(torch.bfloat16).to(dtype))


@BITS
@SHAPES
def test_rows_read_alone_are_those_of_the_whole(bits, rows, columns):
    held = StoredMatrix.hold(noise(rows, columns), bits)
    whole = held.dense()
    for start in range(rows):
        for stop in range(start, rows + 1):
            assert torch.equal(held.dense(start=start, stop=stop), whole[start:stop])


@BITS
def test_appending_leaves_the_rows_held_and_adds_those_asked_for(bits):
    held, more = StoredMatrix.hold(noise(6, 70), bits), StoredMatrix.hold(noise(9, 70, seed=1), bits)
    before = held.dense()
    held.append(more, 4)
    assert held.rows == 11
    assert torch.equal(held.dense(), torch.cat([before, more.dense()[4:]]))


@BITS
@pytest.mark.parametrize("columns", [128, 4096])
def test_bytes_are_what_the_table_says(bits, columns):
    held = StoredMatrix.hold(noise(8, columns), bits)
    an_entry = {16: 2, 8: 1 + 2 / 64, 4: 1 / 2 + 1 / 128 + 2 / columns}[bits]
    assert held.nbytes == 8 * columns * an_entry
    assert held.nbytes == sum(b.untyped_storage().nbytes() for b in held.buffers())


@BITS
@SHAPES
def test_on_meta_the_tensors_have_the_shapes_and_dtypes_of_real_ones(bits, rows, columns):
    real = StoredMatrix.hold(noise(rows, columns), bits)
    empty = StoredMatrix.hold(noise(rows, columns).to("meta"), bits)
    assert [(n, b.shape, b.dtype) for n, b in empty.named_buffers()] == [
        (n, b.shape, b.dtype) for n, b in real.named_buffers()
    ]
    assert empty.dense(start=1).shape == real.dense(start=1).shape


@BITS
def test_zeros_and_extreme_rows_stay_finite_and_exact_zeros_zero(bits):
    matrix = noise(5, 200)
    matrix[0], matrix[1], matrix[2] = 0, matrix[1] * 1e-30, matrix[2] * 1e30
    held = StoredMatrix.hold(matrix, bits).dense()
    assert bool(torch.isfinite(held).all()) and not held[0].any()
    for row in (1, 2, 3):
        assert relative(held[row], matrix[row]) < 1.5 * ERROR[bits]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 200), st.sampled_from([8, 4]), st.integers(0, 2**20))
def test_each_block_is_within_half_a_step_of_the_matrix(rows, columns, bits, seed):
    """int8: half of max/127, plus bf16's rounding; NF4: half of its widest gap, 0.16 of the block's maximum."""
    matrix = noise(rows, columns, seed)
    error = (StoredMatrix.hold(matrix, bits).dense().double() - matrix).abs()
    for start in range(0, columns, BLOCKS[bits]):
        block = slice(start, start + BLOCKS[bits])
        largest = matrix[:, block].abs().amax(1, keepdim=True)
        row = matrix.abs().amax(1, keepdim=True)
        step = 0.5 * 1.01 / 127 + 2**-8 if bits == 8 else 0.153 + 2**-8
        assert bool((error[:, block] <= largest * step + (row / 255 if bits == 4 else 0)).all())


def test_linear_int8_is_more_exact_on_singular_vectors_than_the_dynamic_map():
    V = torch.linalg.svd(noise(256, 256)).Vh
    codes, state = bnb.quantize_blockwise(V.float(), blocksize=64)
    dynamic = relative(bnb.dequantize_blockwise(codes, state), V)
    assert relative(StoredMatrix.hold(V, 8).dense(), V) < 0.8 * dynamic


def test_one_product_of_int8_and_bf16_as_on_a_card_gives_the_same_numbers():
    codes = torch.arange(-127, 129).clamp(max=127).to(torch.int8).repeat(64, 1)
    scales = (
        torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-32, 32)[:, None]
    ).bfloat16()
    held = StoredMatrix(8, 256, {"codes": codes, "scales": scales})
    at_once = torch.mul(codes.view(64, 4, 64), scales.unsqueeze(-1))
    assert at_once.dtype == torch.bfloat16 and torch.equal(at_once.view(64, 256), held.dense())


def test_nf4_is_as_exact_as_bitsandbytes_with_its_own_double_quantisation_and_the_same_blocks():
    V = torch.linalg.svd(noise(256, 256)).Vh
    codes, state = bnb.quantize_4bit(V.float(), blocksize=128, compress_statistics=True, quant_type="nf4")
    theirs = relative(bnb.dequantize_4bit(codes, state), V)
    assert relative(StoredMatrix.hold(V, 4).dense(), V) < 1.01 * theirs


@BITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_model_around_it_changes_no_bit(bits, dtype):
    held = StoredMatrix.hold(noise(9, 100), bits)
    before = [part.clone() for part in held.parts()]
    nn.Sequential(held).to(dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, held.parts(), strict=True))


@BITS
def test_a_copy_is_its_own_matrix_and_nothing_of_it_is_saved(bits):
    held = StoredMatrix.hold(noise(9, 100), bits)
    other = copy.deepcopy(held)
    other.append(held)
    assert held.rows == 9 and other.rows == 18
    assert not held.state_dict()


@BITS
def test_the_parts_are_read_without_the_module(bits):
    held = StoredMatrix.hold(noise(9, 100), bits)
    assert torch.equal(dense_rows(held.layout, held.parts(2, 5), torch.float32), held.dense(torch.float32, 2, 5))


@BITS
@pytest.mark.parametrize(("rows", "columns"), [(9, 64), (5, 700), (40, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stretches_of_rows_and_of_columns_are_those_of_the_whole(monkeypatch, bits, rows, columns, dtype):
    monkeypatch.setattr("qsvft.storage.stored_matrix.SLICE_BYTES", 2048)
    held = StoredMatrix.hold(noise(rows, columns), bits)
    for along, stretches in ((0, held.layout.by_rows), (1, held.layout.by_columns)):
        found = list(stretches(held.parts(), dtype))
        assert torch.equal(torch.cat([part for _, part in found], dim=along), held.dense(dtype))
        assert [where.start for where, _ in found[1:]] == [where.stop for where, _ in found[:-1]]
        if bits != 16 and (rows, columns) == (40, 300):
            assert len(found) > 1


@BITS
def test_the_maps_of_a_basis_are_the_same_in_slices(monkeypatch, bits):
    """Coefficients slice by rows and the way back by columns, so that no product is summed in another order."""
    basis = StoredBasis(StoredMatrix.hold(noise(40, 300), bits))
    a, z, base = (noise(6, n, seed=n).float().requires_grad_() for n in (300, 33, 300))

    def maps() -> list[Tensor]:
        h, back = basis.to_coefficients(a, 33), basis.from_coefficients(base, z)
        return [h, back, *torch.autograd.grad((h.sum() + back.square().sum()), (a, z, base))]

    whole = maps()
    monkeypatch.setattr("qsvft.storage.stored_matrix.SLICE_BYTES", 2048)
    for sliced, expected in zip(maps(), whole, strict=True):
        torch.testing.assert_close(sliced, expected, rtol=1e-5, atol=1e-5)


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match=r"expected 16 .* 8 .* or 4 .*, got 5"):
        StoredMatrix.hold(noise(2, 2), 5)
