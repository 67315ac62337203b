"""What is called equal does not depend on where a weight lies in memory, nor on the number of threads."""

from __future__ import annotations

import pytest
import torch
from placed import OFFSETS, placed
from torch import Tensor, nn

from qsvft.maths.decomposition import Decomposer, chosen_method, decompose
from qsvft.storage.factors import make_bases, measured_scale
from qsvft.storage.nf4 import nf4_parameter
from qsvft.storage.quantization import quantized_linear
from qsvft.storage.residual import residual_linear
from qsvft.storage.stored_matrix import StoredMatrix
from qsvft.storage.weights import stored_tensors
from qsvft.tuner.config import QSVFTConfig
from qsvft.tuner.layer import QSVFTLinear
from qsvft.tuner.probe import weight_sketch

pytestmark = pytest.mark.anywhere

RANK = 16
SHAPES = [(96, 80), (80, 96), (37, 45)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.out_features, layer.in_features = weight.shape
    return layer


def of_nf4(weight: Tensor) -> list[Tensor]:
    found = nf4_parameter(weight)
    state = found.quant_state
    return [found.data, state.absmax, state.offset, state.state2.absmax, state.state2.code]


def of_int8(weight: Tensor) -> list[Tensor]:
    return list(stored_tensors(quantized_linear(linear(weight), 8)))


def of_residual(weight: Tensor) -> list[Tensor]:
    return list(residual_linear(linear(weight), RANK, 8).stored_tensors())


def decomposed(sides: str, decomposition: str):
    def function(weight: Tensor) -> list[Tensor]:
        found = decompose(weight, RANK, sides, chosen_method(min(weight.shape), RANK, decomposition))
        return [part for part in (found.U, found.s, found.V) if part is not None]

    return function


def lengths(weight: Tensor) -> list[Tensor]:
    side = "V" if weight.shape[1] <= weight.shape[0] else "U"
    basis = make_bases(torch.ones_like(weight).tril().float(), RANK, "one", 16)[side]
    return list(measured_scale(weight, basis, side, RANK))


def stored(bits: int):
    return lambda weight: list(StoredMatrix.hold(weight, bits).parts())


def adapter(**options):
    """What is saved of an adapter, and what its M does to the weight when it is merged."""

    def function(weight: Tensor) -> list[Tensor]:
        layer = QSVFTLinear(linear(weight), "default", QSVFTConfig(**options), "layer")
        generator = torch.Generator().manual_seed(1)
        layer.M("default").data.normal_(generator=generator)
        change = layer.get_delta_weight("default")
        return [layer.qsvft_probe["default"], *layer.qsvft_scale.values(), change]

    return function


QUANTITIES = {
    "nf4": of_nf4,
    "int8": of_int8,
    "residual": of_residual,
    "exact": decomposed("one", "exact"),
    "exact, both sides": decomposed("both", "exact"),
    "randomized": decomposed("one", "randomized"),
    "float32": decomposed("one", "float32"),
    "float32, both sides": decomposed("both", "float32"),
    "lengths": lengths,
    "sketch": lambda weight: [weight_sketch(weight)],
    "stored in 16": stored(16),
    "stored in 8": stored(8),
    "stored in 4": stored(4),
    "adapter": adapter(),
    "adapter, one side": adapter(sides="one", pattern="banded"),
    "adapter, both sides": adapter(sides="both", pattern="banded"),
    "adapter, one direction": adapter(sides="one", rank=1, pattern="plain"),
}


@DTYPES
@pytest.mark.parametrize("quantity", QUANTITIES.values(), ids=QUANTITIES.keys())
def test_a_weight_gives_the_same_wherever_it_lies(quantity, dtype):
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        expected = quantity(weight)
        for offset in OFFSETS:
            found = quantity(placed(weight, offset))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (shape, offset)


DECOMPOSERS = [
    Decomposer(randomized, dtype) for randomized in (False, True) for dtype in (torch.float64, torch.float32)
]


@pytest.mark.parametrize("decomposer", DECOMPOSERS, ids=lambda decomposer: decomposer.name)
@pytest.mark.parametrize("shape", [(301, 1), (1, 301), (600, 16), (16, 600)])
def test_a_single_direction_is_the_same_wherever_the_weight_lies(decomposer, shape):
    """A product with one vector, which BLAS sums by the address of the matrix."""
    weight = torch.randn(shape)
    expected = decompose(weight, 1, "both", decomposer)
    for offset in OFFSETS:
        found = decompose(placed(weight, offset), 1, "both", decomposer)
        assert torch.equal(found.U, expected.U) and torch.equal(found.V, expected.V), offset
        assert torch.equal(found.s, expected.s), offset


LARGE = (640, 512)
BITWISE = ("nf4", "int8", "sketch", "stored in 16", "stored in 8", "stored in 4")


@pytest.fixture
def on_threads():
    before = torch.get_num_threads()

    def run(threads, function, *args):
        torch.set_num_threads(threads)
        return function(*args)

    yield run
    torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("name", BITWISE)
def test_weights_and_fingerprints_are_the_same_on_two_threads(on_threads, name, dtype):
    weight = torch.randn(LARGE).to(dtype)
    found, expected = (on_threads(threads, QUANTITIES[name], weight) for threads in (2, 1))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@DTYPES
@pytest.mark.parametrize("sides", ["one", "both"])
def test_probe_and_lengths_follow_from_weight_and_factors_on_any_number_of_threads(on_threads, sides, dtype):
    layer = QSVFTLinear(
        linear(torch.randn(LARGE).to(dtype)), "default", QSVFTConfig(rank=64, sides=sides, factor_bits=16), "layer"
    )
    weight, basis = layer.original_weight(), layer.basis("V_bf16")
    found, expected = (on_threads(threads, layer.compute_probe, "default", weight) for threads in (2, 1))
    assert torch.equal(found, expected)
    found, expected = (on_threads(threads, measured_scale, weight, basis, "V", 64) for threads in (2, 1))
    assert all(torch.allclose(a, b, rtol=2e-7, atol=0) for a, b in zip(found, expected, strict=True))


@DTYPES
@pytest.mark.parametrize("decomposition", ["exact", "randomized"])
def test_vectors_agree_to_ten_digits_on_two_threads(on_threads, decomposition, dtype):
    weight = torch.randn(LARGE).to(dtype)
    found, expected = (on_threads(threads, decomposed("one", decomposition), weight) for threads in (2, 1))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))
