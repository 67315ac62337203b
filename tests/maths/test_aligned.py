"""Where a tensor lies: at a multiple of 64 bytes, or a copy there."""

import pytest
import torch
from placed import OFFSETS, placed

from qsvft.maths.aligned import ALIGNMENT, aligned

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [*OFFSETS, 2, 32])
def test_what_lies_elsewhere_is_copied_to_a_multiple_of_64(dtype, offset):
    tensor = placed(torch.randn(5, 7).to(dtype), offset)
    found = aligned(tensor)
    assert found.data_ptr() % ALIGNMENT == 0
    assert found.dtype == dtype and torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_there_is_not_copied(dtype):
    tensor = torch.randn(5, 7).to(dtype)
    assert aligned(tensor) is tensor
    assert aligned(placed(tensor, 0)).data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool], ids=str)
def test_single_bytes_may_lie_anywhere(dtype):
    tensor = placed(torch.ones(9, dtype=dtype), 38)
    assert aligned(tensor) is tensor


def test_on_another_device_nothing_is_asked():
    tensor = torch.empty(3, device="meta")
    assert aligned(tensor) is tensor


def test_a_turned_view_is_copied_as_it_is_turned():
    """Its strides decide which path a product takes."""
    tensor = placed(torch.randn(5, 7), 4).T
    found = aligned(tensor)
    assert found.stride() == tensor.stride() and torch.equal(found, tensor)
