"""The probe: the same on every machine, and another one for every other map."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import nn

from qsvft import quantize
from qsvft.tuner.config import QSVFTConfig
from qsvft.tuner.layer import QSVFTLinear
from qsvft.tuner.probe import SIZE, TOLERANCE, content_digest, fixed_noise, relative_difference, sketch, weight_sketch

ONE_SIDED = {"sides": "one", "pattern": "banded", "off_diagonals": 2}


def weight(m: int = 40, n: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def adapted(W: torch.Tensor, bits: int = 16, **options) -> QSVFTLinear:
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    model[0].weight.data = W.clone()
    quantize(model, bits, progress=False)
    return QSVFTLinear(model[0], "default", QSVFTConfig(**{**ONE_SIDED, **options}), "layer")


def probe(W: torch.Tensor, bits: int = 16, **options) -> torch.Tensor:
    return adapted(W, bits, **options).qsvft_probe["default"]


def test_noise_follows_its_formula_in_plain_python():
    golden = 0.6180339887498949
    for salt in (1, 2, 17):
        expected = []
        for i in range(1, 301):
            phase = (i * ((i * golden) % 1) + salt * math.sqrt(2) * i) % 1
            expected.append(math.cos(2 * math.pi * phase))
        torch.testing.assert_close(fixed_noise(300, salt), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("salt", [1, 2, 10, 17])
def test_noise_lies_in_minus_one_to_one_and_looks_like_noise(salt):
    noise = fixed_noise(4096, salt)
    assert noise.dtype == torch.float64 and float(noise.abs().max()) <= 1
    assert abs(float(noise.mean())) < 0.05
    neighbours = float((noise[1:] * noise[:-1]).mean() / noise.square().mean())
    assert abs(neighbours) < 0.1


def test_noise_of_other_salts_is_other_noise():
    rows = torch.stack([fixed_noise(4096, salt) for salt in (1, 2, *range(10, 10 + SIZE))])
    rows = rows / rows.norm(dim=1, keepdim=True)
    between = rows @ rows.T - torch.eye(len(rows))
    assert float(between.abs().max()) < 0.1


def test_longer_noise_continues_shorter_noise():
    assert torch.equal(fixed_noise(500, 3)[:100], fixed_noise(100, 3))


def test_the_noise_is_the_cpu_s_whatever_the_default_device_is():
    with torch.device("meta"):
        found = fixed_noise(517, 3, torch.device("cpu"))
    assert torch.equal(found, fixed_noise(600, 3)[:517])


def test_sketch_is_linear_and_eight_numbers_in_fp32():
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert sketch(a).shape == (SIZE,) and sketch(a).dtype == torch.float32
    torch.testing.assert_close(sketch(2 * a - b), 2 * sketch(a) - sketch(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 500, 999])
def test_sketch_sees_every_place(place):
    vector = torch.zeros(1000)
    vector[place] = 1
    assert float(sketch(vector).norm()) > 0.1


def test_a_sketch_is_kept_to_18_bits_which_hide_the_order_of_sums():
    vectors = torch.randn(2000, 50, dtype=torch.float64)
    exact = torch.stack([fixed_noise(50, salt) for salt in range(10, 10 + SIZE)])
    found = torch.stack([sketch(vector) for vector in vectors])
    assert torch.equal(found.view(torch.int32) % 64, torch.zeros_like(found, dtype=torch.int32))
    torch.testing.assert_close(found.double(), vectors @ exact.T, rtol=2**-18 * 1.01, atol=1e-12)
    other = torch.stack([sketch(vector * (1 + 1e-9)) for vector in vectors])
    assert float((found != other).double().mean()) < 2e-3


def test_relative_difference_is_relative_and_zero_for_equals():
    expected = torch.tensor([3.0, 4.0])
    assert relative_difference(expected, expected) == 0
    assert relative_difference(expected * 1.5, expected) == pytest.approx(0.5)
    assert relative_difference(-expected * 1e-20, expected * 1e-20) == pytest.approx(2)


def test_relative_difference_of_zeros_and_of_nan():
    zero, one, nan = torch.zeros(3), torch.ones(3), torch.full((3,), float("nan"))
    assert relative_difference(zero, zero) == 0
    assert relative_difference(one, zero) == math.inf
    assert relative_difference(nan, one) == math.inf
    assert relative_difference(one, nan) == math.inf


MAPS = {
    "one-sided": {},
    "output side": {"shape": (32, 40)},
    "two-sided": {"sides": "both"},
    "random": {"pattern": "random"},
    "top_k": {"pattern": "top_k"},
    "plain": {"pattern": "plain"},
    "dense": {"pattern": "dense"},
    "default": {"pattern": "dense", "sides": "both"},
    "rank": {"rank": 16},
}


@pytest.mark.anywhere
@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("bits", [4, 16])
def test_the_same_base_and_config_give_the_same_probe(options, bits):
    options = dict(options)
    W = weight(*options.pop("shape", (40, 32)))
    assert torch.equal(probe(W, bits, **options), probe(W, bits, **options))


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize(
    "change",
    [
        lambda W: weight(*W.shape, seed=1),
        lambda W: -W,
        lambda W: W + 0.1 * weight(*W.shape, seed=2),
        lambda W: W.flip(0).contiguous(),
        lambda W: W.flip(1).contiguous(),
    ],
    ids=["another", "negated", "noisy", "rows turned", "columns turned"],
)
def test_another_weight_gives_a_probe_that_is_refused(options, change):
    options = dict(options)
    W = weight(*options.pop("shape", (40, 32)))
    layer = adapted(W, **options)
    assert layer.probe_difference("default", probe(change(W), **options)) > TOLERANCE


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probe_and_sketch_are_exact_to_ten_digits_before_they_are_shortened(options, dtype, monkeypatch):
    """What is left of the order of sums is then far below the last bit that is kept."""
    monkeypatch.setattr("qsvft.tuner.probe._shortened", lambda values: values)
    options = dict(options)
    layer = adapted(weight(*options.pop("shape", (40, 32))), **options)
    W = layer.original_weight().to(dtype)
    m, n = W.shape
    x, values = fixed_noise(n, 1), fixed_noise(layer.pattern("default").count, 2).float()
    dW = layer._apply_delta("default", torch.eye(n, dtype=torch.float64), values, W.double()).T
    rows = torch.stack([fixed_noise(m, salt) for salt in range(10, 10 + SIZE)])
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(layer.compute_probe("default", W), rows @ (dW @ x), **close)
    torch.testing.assert_close(weight_sketch(W), rows @ (W.double() @ x), **close)


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS.keys())
def test_scaling_the_weight_changes_neither_dW_nor_its_probe_where_M_has_its_own_unit(options):
    """dW = U M Vᵀ takes only the vectors from W: the probe is one of dW, not of W."""
    options = {**options, "unit": "one"}
    W = weight(*options.pop("shape", (40, 32)))
    layer = adapted(W, **options)
    assert layer.probe_difference("default", probe(8 * W, **options)) < 1e-5


def test_probes_of_quantised_and_original_weights_differ():
    for found, expected in ((4, 16), (16, 4), (8, 4)):
        layer = adapted(weight(), expected)
        assert layer.probe_difference("default", probe(weight(), found)) > TOLERANCE


@pytest.mark.parametrize("name", ["random", "top_k", "plain", "dense", "default", "rank"])
def test_another_pattern_or_rank_gives_a_probe_that_is_refused(name):
    layer = adapted(weight())
    assert layer.probe_difference("default", probe(weight(), **MAPS[name])) > TOLERANCE


def test_another_seed_of_the_random_pattern_gives_a_probe_that_is_refused():
    layer = adapted(weight(), pattern="random", seed=0)
    assert layer.probe_difference("default", probe(weight(), pattern="random", seed=1)) > TOLERANCE


@pytest.mark.parametrize("row", [0, 7, 31])
@pytest.mark.parametrize("sides", ["one", "both"])
def test_one_flipped_sign_in_a_factor_is_seen(row, sides):
    layer = adapted(weight(), sides=sides)
    layer.basis("V_bf16").stored.values[row] *= -1
    flipped = layer.compute_probe("default", layer.original_weight())
    assert layer.probe_difference("default", flipped) > TOLERANCE


@pytest.mark.anywhere
def test_factors_recomputed_elsewhere_stay_far_below_the_tolerance():
    """Another driver or thread count moves fp64 vectors by 1e-10: some entries then round to the other bf16."""
    layer = adapted(weight())
    stored = layer.basis("V_bf16").stored
    V = stored.values.clone()
    every_hundredth = torch.arange(V.numel()).view(V.shape) % 100 == 0
    stored.values = torch.where(every_hundredth, torch.nextafter(V, 2 * V), V)
    assert not torch.equal(stored.values, V)
    moved = layer.compute_probe("default", layer.original_weight())
    assert 0 < layer.probe_difference("default", moved) < TOLERANCE / 3


def test_the_probe_does_not_depend_on_M():
    layer = adapted(weight())
    before = layer.compute_probe("default", layer.original_weight())
    layer.M("default").data.normal_()
    assert torch.equal(layer.compute_probe("default", layer.original_weight()), before)


def test_a_zero_weight_has_a_probe_that_fits_itself():
    layer = adapted(torch.zeros(8, 8), off_diagonals=1)
    assert bool(torch.isfinite(layer.qsvft_probe["default"]).all())
    layer._verified.clear()
    layer.verify("default")


def test_a_forward_with_a_wrong_probe_is_refused_by_name_and_one_with_the_right_probe_runs():
    layer, x = adapted(weight()), torch.randn(2, 32)
    layer(x)
    layer.qsvft_probe["default"].mul_(1 + 2 * TOLERANCE)
    layer._verified.clear()
    with pytest.raises(ValueError, match=r"^layer: adapter 'default' does not fit this base model"):
        layer(x)
    layer.qsvft_probe["default"].div_(1 + 2 * TOLERANCE)
    layer(x)


def test_a_nan_probe_is_refused():
    layer = adapted(weight())
    layer.qsvft_probe["default"].fill_(float("nan"))
    layer._verified.clear()
    with pytest.raises(ValueError, match="does not fit"):
        layer(torch.randn(2, 32))


def test_content_digest_is_the_sha256_of_bytes_and_strings_in_order():
    values, positions = torch.randn(5), torch.arange(3)
    expected = hashlib.sha256(values.numpy().tobytes() + b"pattern" + positions.numpy().tobytes()).digest()
    found = content_digest(values, "pattern", positions)
    assert found.dtype == torch.uint8 and bytes(found.tolist()) == expected


def test_content_digest_changes_with_any_part():
    values = torch.randn(5)
    digests = {
        bytes(content_digest(*parts).tolist())
        for parts in (
            (values, "a"),
            (values, "b"),
            ("a", values),
            (values.nextafter(torch.tensor(9.0)), "a"),
            (values.flip(0), "a"),
            (values.double(), "a"),
        )
    }
    assert len(digests) == 6


def test_content_digest_reads_strided_and_bf16_tensors():
    table = torch.randn(4, 6).bfloat16()
    assert torch.equal(content_digest(table.T), content_digest(table.T.contiguous()))
    assert not torch.equal(content_digest(table.T), content_digest(table))
