"""4-bit weights whose blocks reach from one row into the next."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qsvft
from qsvft.storage import blocks_over_rows
from qsvft.storage.weights import dense_weight


def gaussian(m, n, dtype=torch.float32):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m * n)).to(dtype)


def read(codes, absmax, table, shape, dtype):
    """What the codes stand for, in plain code."""
    both = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[: shape.numel()]
    return (table[both.long()] * absmax.repeat_interleave(64)[: shape.numel()]).to(dtype).view(shape)


@given(st.integers(2, 9), st.integers(1, 20), st.sampled_from((1, 2, 16)), st.sampled_from(("nf4", "fp4")))
def test_every_number_is_its_own_code_times_the_maximum_of_its_own_block(m, parts, part, kind):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        W = gaussian(m, part * parts, dtype)
        codes, state = quantize_4bit(W, blocksize=64, quant_type=kind)
        found = torch.ops.bitsandbytes.dequantize_4bit.default(codes, state.absmax, 64, kind, W.shape, dtype)
        assert torch.equal(found, read(codes, state.absmax, state.code, W.shape, dtype))


@pytest.mark.parametrize("n", [48, 96, 4304])
def test_a_quantised_layer_computes_with_the_weight_that_it_was_given_to_a_tenth(n):
    layer = nn.Linear(n, 80, bias=False)
    layer.weight.data = gaussian(80, n)
    W, x = layer.weight.detach().clone(), gaussian(7, n).requires_grad_()
    held = qsvft.quantize(nn.Sequential(layer), 4, progress=False)[0]
    dense = dense_weight(held)
    assert float((dense - W).norm() / W.norm()) == pytest.approx(0.093, abs=0.004)
    y = held(x)
    torch.testing.assert_close(y, x @ dense.t())
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))
    with torch.no_grad():
        torch.testing.assert_close(held.eval()(x[:1]), x[:1] @ dense.t())


class Previous:
    """A kernel that says for which shape it was called."""

    def call_boxed(self, keys, A, absmax, block, kind, shape, dtype):
        self.shape = list(shape)
        return torch.arange(torch.Size(shape).numel(), dtype=dtype).view(*shape)


@pytest.mark.parametrize(
    ("shape", "asked"), [([2, 64], [2, 64]), ([3, 33], [3, 33]), ([3, 48], [1, 144]), ([3, 2], [1, 6])]
)
def test_a_weight_is_read_as_one_row_where_its_rows_are_no_whole_blocks(monkeypatch, shape, asked):
    previous = Previous()
    monkeypatch.setattr(torch.library, "get_kernel", lambda operator, key: previous)
    mended = blocks_over_rows.mend()
    try:
        arguments = (torch.zeros(1), torch.zeros(1), 64, "nf4", shape, torch.float32)
        found = torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
    finally:
        mended._destroy()
    assert previous.shape == asked
    assert torch.equal(found, torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(*shape))
    assert blocks_over_rows.reads_blocks_over_rows()  # as it was before


def test_a_fault_is_seen(monkeypatch):
    previous = Previous()
    monkeypatch.setattr(torch.library, "get_kernel", lambda operator, key: previous)
    mended = blocks_over_rows.mend()
    try:
        assert not blocks_over_rows.reads_blocks_over_rows()
    finally:
        mended._destroy()
