"""NF4 on any number of threads: bitsandbytes' codes, and one offset."""

import math

import bitsandbytes as bnb
import pytest
import torch

from qsvft.storage import nf4
from qsvft.storage.nf4 import nf4_codes, nf4_parameter

SHAPES = [(64, 64), (3, 64), (1, 1), (5, 13), (7, 30), (1100, 512), (1, 2**18 + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_maxima_are_those_of_bitsandbytes(shape, dtype):
    weight = torch.randn(*shape).to(dtype)
    found = nf4_parameter(weight)
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(found.data, codes) and torch.equal(found.quant_state.code, state.code)
    dense = bnb.functional.dequantize_4bit(found.data, found.quant_state)
    assert dense.shape == weight.shape and dense.dtype == dtype
    expected = bnb.functional.dequantize_4bit(codes, state)
    # Double quantisation rounds the maxima to eight bits.
    assert float((dense - expected).abs().max()) <= 0.02 * float(expected.abs().max()) + 1e-6


def test_at_and_beside_each_threshold():
    """Numbers that lie where the code changes, and the next ones on both sides; the block's maximum is 1."""
    numbers = bnb.functional.get_4bit_type("nf4", device="cpu")
    middles = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    near = torch.cat([middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity), numbers])
    weight = torch.cat([near, near.new_zeros(-(near.numel() + 1) % 64), near.new_ones(1)]).view(-1, 64)
    weight = torch.cat([weight, weight.flip(0)])
    weight[:, 0] = 1.0
    assert torch.equal(
        nf4_parameter(weight).data, bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)[0]
    )


def test_blocks_of_zeros_stay_zeros():
    weight = torch.zeros(4, 64)
    found = nf4_parameter(weight)
    assert torch.equal(bnb.functional.dequantize_4bit(found.data, found.quant_state), weight)


@pytest.mark.anywhere
def test_the_bits_do_not_depend_on_the_number_of_threads():
    # Maxima enough that torch divides their sum between threads.
    before, weight, found = torch.get_num_threads(), torch.randn(2048, 1280), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(nf4_parameter(weight))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].data, other.data)
        assert torch.equal(found[0].quant_state.offset, other.quant_state.offset)
        assert torch.equal(found[0].quant_state.absmax, other.quant_state.absmax)
        assert torch.equal(found[0].quant_state.state2.absmax, other.quant_state.state2.absmax)


@pytest.mark.anywhere
def test_the_offset_is_the_mean_of_the_maxima_rounded_once():
    """Sums in fp32 come out a last bit higher or lower for some of these."""
    for _ in range(20):
        weight = torch.randn(256, 256)
        maxima = weight.view(-1, 64).abs().amax(-1).tolist()
        assert float(nf4_parameter(weight).quant_state.offset) == float(torch.tensor(math.fsum(maxima) / len(maxima)))


def test_double_quantisation_is_that_of_bitsandbytes_up_to_the_last_bit_of_the_offset():
    weight = torch.randn(512, 512)
    found, theirs = nf4_parameter(weight), bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    ours, state = found.quant_state, theirs.quant_state
    assert abs(float(ours.offset - state.offset)) < 1e-6 * float(state.offset)
    dense, expected = (bnb.functional.dequantize_4bit(one.data, one.quant_state) for one in (found, theirs))
    assert torch.allclose(dense, expected, rtol=1e-6)
    assert {name: getattr(ours, name) for name in ("blocksize", "quant_type", "dtype", "shape", "nested")} == {
        name: getattr(state, name) for name in ("blocksize", "quant_type", "dtype", "shape", "nested")
    }


@pytest.mark.parametrize(("device", "expected"), [("cpu", 4), ("meta", 1)])
def test_away_from_the_cpu_a_weight_is_quantised_in_one_launch(device, expected, monkeypatch):
    """Stretches that suit a CPU's caches would be thousands of launches on a card."""
    seen = []

    def counted(stretch, block):
        seen.append(stretch.numel())
        return quantized(stretch, block)

    quantized = nf4._quantized
    monkeypatch.setattr(nf4, "_quantized", counted)
    codes, maxima = nf4_codes(torch.zeros(2**20, device=device), 64)
    assert len(seen) == expected and sum(seen) == 2**20
    assert codes.shape == (2**19, 1) and maxima.shape == (2**14,)
