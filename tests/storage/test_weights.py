"""all_finite sees every NaN and Inf, in every dtype that weights and factors have."""

from __future__ import annotations

import pytest
import torch

from qsvft.storage.weights import all_finite

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, 500, 1026])
@pytest.mark.parametrize("shape", [(1027,), (13, 79)], ids=str)
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype, value, place, shape):
    tensor = torch.randn(shape).to(dtype)
    assert all_finite(tensor)
    tensor.view(-1)[place] = value
    assert not all_finite(tensor)
    assert not all_finite(tensor.t())


@DTYPES
def test_the_largest_numbers_nothing_and_a_scalar_are_finite(dtype):
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([largest, -largest], dtype=dtype))
    assert all_finite(torch.empty(0, 3, dtype=dtype)) and all_finite(torch.tensor(1.0, dtype=dtype))
    assert not all_finite(torch.tensor(torch.nan, dtype=dtype))
