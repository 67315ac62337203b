"""z = N h and its gradients, against the dense matrix N and plain autograd."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsvft.maths.banded_coefficients import _transposed_band, band_from_values, values_from_band
from qsvft.maths.indexed_coefficients import entry_rows
from qsvft.maths.patterns import DensePattern, IndexPattern, Pattern, banded, plain, random_entries

ranks_and_bands = st.integers(1, 90).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, min(k - 1, 40))))
SCALES = pytest.mark.parametrize("scale_side", [None, "rows", "columns"])


def ingredients(pattern: Pattern, tokens: int, dtype: torch.dtype, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return SimpleNamespace(
        h=noise(tokens, pattern.rank).to(dtype),
        g=noise(tokens, pattern.rank).to(dtype),
        values=noise(pattern.count).to(torch.promote_types(dtype, torch.float32)),
        scale=(noise(pattern.rank).abs() + 0.2).to(torch.promote_types(dtype, torch.float32)),
    )


def naive(pattern: Pattern, h: Tensor, values: Tensor, scale: Tensor | None, side: str | None) -> Tensor:
    """The formula on a dense N, in the dtype of h."""
    N = pattern.dense(values.to(h.dtype))
    if side == "rows":
        N = scale.to(h.dtype).unsqueeze(1) * N
    elif side == "columns":
        N = N * scale.to(h.dtype)
    return h @ N.T


def ours(pattern: Pattern, h: Tensor, values: Tensor, scale: Tensor | None, side: str | None) -> Tensor:
    return pattern.product(h, values) if side is None else pattern.product(h, values, scale, side)


def value_and_gradients(product, pattern: Pattern, parts: SimpleNamespace, side: str | None) -> list[Tensor]:
    h, values = parts.h.clone().requires_grad_(), parts.values.clone().requires_grad_()
    z = product(pattern, h, values, parts.scale, side)
    z.backward(parts.g)
    return [z.detach(), h.grad, values.grad]


def in_double(parts: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{name: tensor.double() for name, tensor in vars(parts).items()})


def error(found: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - truth) / torch.linalg.vector_norm(truth))


@settings(max_examples=40, deadline=None)
@given(ranks_and_bands)
def test_band_places_each_entry_by_row_and_distance_from_the_diagonal(case):
    rank, d = case
    pattern = banded(rank, d)
    values = torch.arange(1.0, pattern.count + 1)
    band, dense = band_from_values(values, rank, d), pattern.dense(values)
    expected = torch.zeros(rank, 2 * d + 1)
    for i, t in itertools.product(range(rank), range(2 * d + 1)):
        if 0 <= i + t - d < rank:
            expected[i, t] = dense[i, i + t - d]
    assert torch.equal(band, expected)


@settings(max_examples=40, deadline=None)
@given(ranks_and_bands)
def test_values_come_back_from_their_band(case):
    rank, d = case
    values = torch.randn(banded(rank, d).count)
    assert torch.equal(values_from_band(band_from_values(values, rank, d), d), values)


@settings(max_examples=40, deadline=None)
@given(ranks_and_bands.filter(lambda case: case[1] > 0))
def test_transposed_band_is_the_band_of_the_transposed_matrix(case):
    rank, d = case
    pattern = banded(rank, d)
    values = torch.randn(pattern.count)
    rows, columns = pattern.indices()
    of_transposed = band_from_values(pattern.dense(values).T[rows, columns], rank, d)
    assert torch.equal(_transposed_band(band_from_values(values, rank, d), d), of_transposed)


def test_rows_of_entries_follow_from_the_offsets_also_where_rows_are_empty():
    pattern = IndexPattern(5, torch.tensor([1, 3, 15, 19, 16]))
    assert entry_rows(pattern.columns, pattern.offsets).tolist() == [0, 0, 3, 3, 3]


@settings(max_examples=30, deadline=None)
@given(ranks_and_bands, st.integers(0, 20), st.sampled_from([None, "rows", "columns"]))
def test_banded_product_and_gradients_equal_the_dense_ones(case, tokens, side):
    pattern = banded(*case)
    parts = ingredients(pattern, tokens, torch.float64)
    found, truth = (value_and_gradients(f, pattern, parts, side) for f in (ours, naive))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 20), st.sampled_from([None, "rows", "columns"]))
def test_product_and_gradients_with_a_dense_m_equal_the_naive_ones(rank, tokens, side):
    pattern = DensePattern(rank)
    parts = ingredients(pattern, tokens, torch.float64)
    found, truth = (value_and_gradients(f, pattern, parts, side) for f in (ours, naive))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12).flatmap(lambda k: st.tuples(st.just(k), st.sets(st.integers(0, k * k - 1), min_size=1))),
    st.integers(0, 20),
    st.sampled_from([None, "rows", "columns"]),
)
def test_product_and_gradients_of_any_list_of_entries_equal_the_dense_ones(case, tokens, side):
    rank, flat = case
    pattern = IndexPattern(rank, torch.tensor(sorted(flat)))
    parts = ingredients(pattern, tokens, torch.float64)
    found, truth = (value_and_gradients(f, pattern, parts, side) for f in (ours, naive))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


PATTERNS = {
    "plain": plain(189),
    "banded": banded(189, 5),
    "whole blocks": banded(128, 32),
    "a halo wider than a block": banded(189, 70),
    "random": random_entries(189, 5, "0"),
    "dense": DensePattern(70),
}
EACH_PATTERN = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


@EACH_PATTERN
@SCALES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_no_worse_than_the_dense_formula_in_the_same_dtype(pattern, scale_side, dtype):
    parts = ingredients(pattern, 300, dtype)
    truth = value_and_gradients(naive, pattern, in_double(parts), scale_side)
    found = value_and_gradients(ours, pattern, parts, scale_side)
    reference = value_and_gradients(naive, pattern, parts, scale_side)
    for name, a, b, true in zip(("z", "gradient of h", "gradient of M"), found, reference, truth, strict=True):
        assert error(a, true) <= 1.1 * error(b, true) + 0.1 * torch.finfo(dtype).eps, name


@EACH_PATTERN
@pytest.mark.parametrize("tokens", [1, 256, 257, 600, 2048, 2049, 4400])
def test_cutting_the_tokens_into_chunks_changes_nothing(pattern, tokens):
    parts = ingredients(pattern, tokens, torch.float64)
    found, truth = (value_and_gradients(f, pattern, parts, "rows") for f in (ours, naive))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@EACH_PATTERN
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_sums_over_tokens_do_not_stall_in_low_precision(pattern, dtype):
    """A running sum of ones in bf16 stops growing at 256."""
    tokens = 1027
    values = torch.zeros(pattern.count, requires_grad=True)
    pattern.product(torch.ones(tokens, pattern.rank, dtype=dtype), values).sum().backward()
    assert torch.equal(values.grad, torch.full_like(values, tokens))


@EACH_PATTERN
@SCALES
def test_dtypes_stay_z_in_that_of_h_and_the_gradient_of_M_in_that_of_M(pattern, scale_side):
    parts = ingredients(pattern, 3, torch.bfloat16)
    z, grad_h, grad_values = value_and_gradients(ours, pattern, parts, scale_side)
    assert (z.dtype, grad_h.dtype, grad_values.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "pattern", [plain(7), banded(7, 2), random_entries(7, 2, "0")], ids=["plain", "banded", "random"]
)
@SCALES
def test_gradcheck(pattern, scale_side):
    parts = ingredients(pattern, 4, torch.float64)
    inputs = (parts.h.requires_grad_(), parts.values.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, v: ours(pattern, h, v, parts.scale, scale_side), inputs)


@EACH_PATTERN
def test_only_the_gradients_asked_for_are_computed(pattern):
    parts = ingredients(pattern, 5, torch.float32)
    h, values = parts.h.clone().requires_grad_(), parts.values.clone()
    pattern.product(h, values, parts.scale).backward(parts.g)
    assert h.grad is not None and values.grad is None

    h, values = parts.h.clone(), parts.values.clone().requires_grad_()
    pattern.product(h, values, parts.scale).backward(parts.g)
    assert h.grad is None and values.grad is not None


@EACH_PATTERN
def test_strided_activations_and_gradients_give_the_same_as_contiguous_ones(pattern):
    parts = ingredients(pattern, 65, torch.float64)
    strided = SimpleNamespace(**vars(parts))
    strided.h, strided.g = parts.h.T.contiguous().T, parts.g.T.contiguous().T
    assert not strided.h.is_contiguous()
    expected = value_and_gradients(ours, pattern, parts, "columns")
    for a, b in zip(value_and_gradients(ours, pattern, strided, "columns"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@EACH_PATTERN
def test_shapes_follow_on_the_meta_device(pattern):
    h = torch.empty(300, pattern.rank, dtype=torch.bfloat16, device="meta", requires_grad=True)
    values = torch.empty(pattern.count, device="meta", requires_grad=True)
    z = copy.deepcopy(pattern).to("meta").product(h, values)
    assert z.shape == h.shape and z.dtype == h.dtype and z.is_meta
