"""QSVFTLinear against (W + U M Vᵀ) x + b, written out dense in fp64 from the weight and factors as held."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from small_models import load, same_tensors
from torch import nn
from transformers.pytorch_utils import Conv1D

import qsvft
from qsvft import QSVFTConfig
from qsvft.maths.updates import TAIL_DAMPING
from qsvft.options.choices import PATTERNS
from qsvft.tuner import QSVFTLinear

SHAPES = {"tall": (96, 64), "wide": (64, 96), "square": (64, 64), "odd": (37, 50)}
ONE_SIDED = {"sides": "one", "pattern": "banded", "off_diagonals": 4, "factor_bits": 16}
FORMS = {"one": {}, "both": {"sides": "both"}, "default": {"sides": "both", "pattern": "dense"}}
EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def linear(shape, bias=True, dtype=torch.float32):
    m, n = shape
    return nn.Linear(n, m, bias=bias).to(dtype)


def adapted(base, name="default", scale=0.3, **options):
    layer = QSVFTLinear(base, name, QSVFTConfig(**{**ONE_SIDED, **options}), "block.layer")
    fill(layer, name, scale)
    return layer


@torch.no_grad()
def fill(layer, name, scale=0.3, seed=3):
    M = layer.M(name)
    M.copy_(torch.randn(M.shape, generator=torch.Generator().manual_seed(seed)) * scale)


def held_weight(base):
    """W (m, n) as held, in fp64, read without the library."""
    if isinstance(base, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    if isinstance(base, Conv1D):
        return base.weight.detach().double().T
    return base.weight.detach().double()


def dense_M(layer, name="default"):
    """M (k, k) in fp64: row-major entries of the band, or those of the stored list."""
    k, d = layer.pattern(name).rank, layer.settings[name].off_diagonals
    kind = layer.settings[name].pattern
    if kind in ("plain", "banded"):
        d = 0 if kind == "plain" else d
        places = [(i, j) for i in range(k) for j in range(k) if abs(i - j) <= d]
        rows, columns = torch.tensor(places).T
    else:
        rows, columns = layer.pattern(name).indices()
    M = torch.zeros(k, k, dtype=torch.float64)
    return M.index_put((rows, columns), layer.M(name).double())


def held_rows(layer, side, k):
    """The first k directions of one side as the layer holds them in bf16, fp64; None if it does not."""
    key = f"{side}_bf16"
    return layer.basis(key).dense(torch.float64, k) if key in layer.qsvft_bases else None


def dense_delta(layer, W, name="default"):
    """dW of each form as its docstring defines it, differentiable in M."""
    M = dense_M(layer, name)
    if layer.settings[name].unit == "weight":
        M = M * (W.norm() * M.shape[0] ** 0.5 / layer.M(name).numel())
    k = M.shape[0]
    U, V = (held_rows(layer, side, k) for side in "UV")
    if layer.settings[name].sides == "both":
        return U.T @ M @ V
    floor = TAIL_DAMPING * (W.square().sum() / min(W.shape)).sqrt()
    if W.shape[1] <= W.shape[0]:
        inverse = 1 / torch.maximum((W @ V.T).norm(dim=0), floor)
        return W @ V.T @ (inverse[:, None] * M) @ V
    inverse = 1 / torch.maximum((U @ W).norm(dim=1), floor)
    return U.T @ (M * inverse) @ U @ W


def reference(layer, base, x, bias=None, names=("default",)):
    W = held_weight(base)
    total = W + sum(dense_delta(layer, W, name) for name in names)
    y = x.double() @ total.T
    return y if bias is None else y + bias.detach().double()


def error(found, expected):
    """|found - expected| / |expected|"""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def gradients(y, layer, x, names=("default",)):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.autograd.grad((y.double() * weights).sum(), [x, *(layer.M(n) for n in names)])


def assert_matches_reference(layer, base, tolerance, bias=None, dtype=torch.float32, names=("default",)):
    x = torch.randn(2, 5, layer.in_features, dtype=dtype, requires_grad=True)
    y, expected = layer(x), reference(layer, base, x, bias, names)
    assert y.dtype == dtype
    assert error(y, expected) < tolerance
    found, wanted = gradients(y, layer, x, names), gradients(expected, layer, x, names)
    for ours, theirs in zip(found, wanted, strict=True):
        assert error(ours, theirs.double()) < tolerance
    return y


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_match_the_dense_reference(shape, sides, pattern):
    base = linear(SHAPES[shape])
    layer = adapted(base, sides=sides, pattern=pattern)
    assert_matches_reference(layer, base, 1e-5, base.bias)


@EACH_FORM
@pytest.mark.parametrize("shape", SHAPES)
def test_a_truncated_rank_matches_the_dense_reference(shape, form):
    base = linear(SHAPES[shape], bias=False)
    layer = adapted(base, **form, rank=16)
    assert layer.pattern("default").rank == 16
    assert_matches_reference(layer, base, 1e-5)


@EACH_FORM
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding_of_the_reference(shape, form, dtype):
    base = linear(SHAPES[shape], dtype=dtype)
    layer = adapted(base, **form)
    assert_matches_reference(layer, base, 4 * torch.finfo(dtype).eps, base.bias, dtype)


@EACH_FORM
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_a_4_bit_base_matches_the_reference_on_its_dequantised_weight(shape, form):
    m, n = SHAPES[shape]
    base = bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    base.support_avx512bf16_for_cpu = False
    layer = adapted(base, **form)
    assert_matches_reference(layer, base, 1e-5, base.bias)


@EACH_FORM
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_a_conv1d_base_matches_the_reference(shape, form):
    m, n = SHAPES[shape]
    base = Conv1D(m, n)
    nn.init.normal_(base.bias)
    layer = adapted(base, **form)
    assert (layer.out_features, layer.in_features) == (m, n)
    assert_matches_reference(layer, base, 1e-5, base.bias)


def test_a_large_bias_on_the_output_side_is_not_scaled_by_the_adapter():
    base = linear(SHAPES["wide"])
    nn.init.constant_(base.bias, 100.0)
    layer = adapted(base)
    x = torch.randn(7, layer.in_features)
    expected = reference(layer, base, x)
    assert error(layer(x).double() - 100.0, expected) < 1e-4


def test_a_large_bias_on_the_output_side_leaves_bf16_gradients_of_M_accurate():
    """y is rounded where the bias is large; what the adapter reads of W x must not be."""
    base = linear(SHAPES["wide"], dtype=torch.bfloat16)
    nn.init.constant_(base.bias, 30.0)
    layer = adapted(base)
    x = torch.randn(7, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    (_, ours), (_, exact) = gradients(layer(x), layer, x), gradients(reference(layer, base, x), layer, x)
    assert error(ours, exact.double()) < 2e-2


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_two_active_adapters_add_up_whatever_their_rank_pattern_and_form(shape):
    base = linear(SHAPES[shape])
    layer = adapted(base, "a", rank=24, pattern="banded", sides="one")
    layer.update_layer("b", QSVFTConfig(rank=40, pattern="random", off_diagonals=2, sides="both"))
    layer.update_layer("c", QSVFTConfig(pattern="plain", sides="one"))
    layer.update_layer("d", QSVFTConfig(factor_bits=16))
    for seed, name in enumerate("abcd"):
        fill(layer, name, seed=seed)
    layer.set_adapter(["a", "b", "c", "d"])
    assert_matches_reference(layer, base, 1e-5, base.bias, names=("a", "b", "c", "d"))


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_on_a_residual_base_and_a_one_sided_one_add_up(shape, bias):
    layer = adapted(linear(SHAPES[shape], bias), "a", rank=16, sides="both", residual=True, factor_bits=8)
    layer.update_layer("b", QSVFTConfig(**ONE_SIDED, rank=20))
    fill(layer, "b")
    layer.set_adapter(["a", "b"])
    x = torch.randn(5, layer.in_features)
    W = layer.original_weight() + layer.get_delta_weight("a") + layer.get_delta_weight("b")
    expected = nn.functional.linear(x, W, layer.original_base().bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_adding_an_adapter_leaves_the_first_ones_map_bit_for_bit():
    layer = adapted(linear(SHAPES["tall"]), "a", rank=16)
    x = torch.randn(4, layer.in_features)
    before = layer(x)
    layer.update_layer("b", QSVFTConfig(sides="both"))
    layer.set_adapter("a")
    assert torch.equal(layer(x), before)


@EACH_FORM
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_an_inactive_adapter_adds_nothing(shape, form):
    layer = adapted(linear(SHAPES[shape]), "a", **form)
    x = torch.randn(4, layer.in_features)
    alone = layer(x)
    layer.update_layer("b", QSVFTConfig(**{**ONE_SIDED, **form, "off_diagonals": 2}))
    fill(layer, "b", seed=4)
    layer.set_adapter("a")
    assert torch.equal(layer(x), alone)
    layer.set_adapter("b")
    assert not torch.allclose(layer(x), alone)


def test_inputs_are_cast_nowhere_so_that_casting_can_be_switched_off():
    """M is cast to the dtype of the input, which is what PEFT's switch is there to ask for."""
    model = nn.Sequential(adapted(linear((64, 48), dtype=torch.bfloat16)))
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    expected = model(x)
    with disable_input_dtype_casting(model):
        found = model(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@EACH_FORM
def test_disabled_adapters_leave_the_base_bit_for_bit(form):
    base = linear(SHAPES["tall"])
    layer = adapted(base, **form)
    x = torch.randn(4, layer.in_features)
    assert not torch.equal(layer(x), base(x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EACH_FORM
@pytest.mark.parametrize("shape", SHAPES)
def test_with_M_zero_the_base_comes_out_bit_for_bit(shape, form, dtype):
    base = linear(SHAPES[shape], dtype=dtype)
    layer = adapted(base, scale=0.0, **form)
    x = torch.randn(3, 5, layer.in_features, dtype=dtype)
    assert torch.equal(layer(x), base(x))


@EACH_FORM
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_with_M_zero_under_autocast_the_base_comes_out_bit_for_bit(shape, form):
    base = linear(SHAPES[shape])
    layer = adapted(base, scale=0.0, **form)
    x = torch.randn(3, 5, layer.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = layer(x), base(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@EACH_FORM
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_autocast_gives_the_adapted_map_and_fp32_gradients_of_M(shape, form):
    base = linear(SHAPES[shape])
    layer = adapted(base, **form)
    x = torch.randn(7, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    expected = reference(layer, base, x, base.bias)
    assert error(y, expected) < 2e-2
    found, wanted = gradients(y, layer, x), gradients(expected, layer, x)
    assert [g.dtype for g in found] == [torch.float32, torch.float32]
    assert error(found[1], wanted[1].double()) < 2e-2


@EACH_FORM
def test_an_empty_batch_has_an_empty_output_and_a_zero_gradient(form):
    layer = adapted(linear(SHAPES["tall"]), **form)
    y = layer(torch.randn(0, layer.in_features))
    y.sum().backward()
    assert y.shape == (0, layer.out_features)
    assert torch.equal(layer.M("default").grad, torch.zeros_like(layer.M("default")))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_delta_weight_is_the_dense_reference(shape, sides, pattern):
    base = linear(SHAPES[shape])
    layer = adapted(base, sides=sides, pattern=pattern)
    delta = layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape and delta.dtype == torch.float32
    assert error(delta, dense_delta(layer, held_weight(base))) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@EACH_FORM
def test_merging_gives_the_adapters_outputs_and_unmerging_the_base_bit_for_bit(kind, form):
    m, n = SHAPES["tall"]
    if kind == "nf4":
        base = bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
        base.support_avx512bf16_for_cpu = False
    else:
        base = Conv1D(m, n) if kind == "conv1d" else linear((m, n))
    layer = adapted(base, **form)
    weight = base.weight.detach().clone()
    x = torch.randn(4, n)
    before = layer(x)
    layer.merge()
    assert layer.merged and not isinstance(layer.base_layer, bnb.nn.Linear4bit)
    assert error(layer(x), before.double()) < 1e-5
    layer.unmerge()
    assert layer.base_layer is base and not layer.merged
    assert torch.equal(base.weight, weight)
    assert torch.equal(layer(x), before)


def test_two_adapters_merge_together_as_one_after_the_other():
    base = linear(SHAPES["wide"])
    layer = adapted(base, "a")
    layer.update_layer("b", QSVFTConfig(rank=20, pattern="plain", sides="both"))
    fill(layer, "b", seed=5)
    W = held_weight(base)
    expected = W + dense_delta(layer, W, "a") + dense_delta(layer, W, "b")
    layer.merge(adapter_names=["a", "b"])
    together = layer.base_layer.weight.clone()
    assert layer.merged_adapters == ["a", "b"]
    assert error(together, expected) < 1e-6
    layer.unmerge()
    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["b"])
    assert torch.equal(layer.base_layer.weight, together)
    layer.unmerge()
    assert layer.base_layer is base


@EACH_FORM
def test_a_forward_with_adapters_disabled_unmerges_first(form):
    base = linear(SHAPES["tall"])
    layer = adapted(base, **form)
    x = torch.randn(4, layer.in_features)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    assert layer.base_layer is base


@EACH_FORM
def test_safe_merge_refuses_values_that_are_not_finite_and_changes_nothing(form):
    base = linear(SHAPES["tall"])
    layer = adapted(base, **form, unit="one")
    with torch.no_grad():
        layer.M("default").copy_(3e38 * layer.M("default").sign())  # finite, but not what it makes of the weight
    with pytest.raises(ValueError, match=r"block\.layer: merging \['default'\] gives NaN or Inf"):
        layer.merge(safe_merge=True)
    assert layer.base_layer is base and not layer.merged


@pytest.mark.parametrize("unit", ["weight", "one"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_noise_in_M_changes_the_weight_by_a_share_whatever_its_entries_and_alpha(pattern, unit):
    config = QSVFTConfig(pattern=pattern, rank=16, off_diagonals=3, unit=unit, init_weights=False)
    base = linear((48, 64))
    torch.manual_seed(0)
    change = QSVFTLinear(base, "default", config, "layer").get_delta_weight("default")
    assert 0.15 < float(change.norm() / base.weight.detach().norm()) < 0.5  # 0.3, and what few entries leave to chance


def test_merging_twice_warns_and_adds_nothing():
    layer = adapted(linear(SHAPES["tall"]))
    layer.merge()
    weight = layer.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_keeps_M_in_fp32_and_the_factors_in_bf16(dtype):
    layer = adapted(linear(SHAPES["tall"]), sides="both")
    M = layer.M("default").detach().clone()
    layer.update_layer("other", QSVFTConfig(**{**ONE_SIDED, "off_diagonals": 2}, rank=4))
    factors = {name: b.clone() for name, b in layer.named_buffers() if "probe" not in name}
    nn.Sequential(layer).to(dtype)
    assert layer.base_layer.weight.dtype == dtype
    assert layer.M("default").dtype == torch.float32
    assert torch.equal(layer.M("default"), M)
    held = {name: b for name, b in layer.named_buffers() if "probe" not in name}
    assert same_tensors(held, factors)
    assert {name: t.dtype for name, t in held.items()} == {
        "qsvft_bases.V_bf16.stored.values": torch.bfloat16,
        "qsvft_bases.U_bf16.stored.values": torch.bfloat16,
        "qsvft_scale.other": torch.float32,
    }


def test_casting_M_through_its_data_keeps_every_bit_of_it():
    layer = adapted(linear(SHAPES["tall"]))
    M = layer.M("default")
    before = M.detach().clone()
    M.data = M.data.to(torch.bfloat16)
    assert M.dtype == torch.float32 and torch.equal(M, before)


def test_the_forward_refuses_an_M_that_is_not_fp32():
    layer = adapted(linear(SHAPES["tall"]))
    layer.qsvft_M["default"].weight = nn.Parameter(layer.M("default").detach().bfloat16())
    with pytest.raises(RuntimeError, match=r"block\.layer: M of adapter 'default' is torch\.bfloat16; expected torch"):
        layer(torch.randn(1, layer.in_features))


class PackedLinear(nn.Module):
    """Stands for GPTQ or AWQ: a linear map whose weight can be read only by applying it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.round(linear.weight.detach() * 512).to(torch.int16))
        self.register_buffer("scales", torch.tensor(1 / 512))
        self.bias = linear.bias

    def hidden(self):
        return self.qweight.float() * self.scales

    def forward(self, x):
        return nn.functional.linear(x, self.hidden().to(x.dtype), self.bias)


@EACH_FORM
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_a_base_of_unknown_storage_is_read_through_its_own_forward(shape, form):
    base = PackedLinear(linear(SHAPES[shape]))
    layer = adapted(base, **form)
    held = nn.Linear(base.in_features, base.out_features)
    held.weight = nn.Parameter(base.hidden())
    assert_matches_reference(layer, held, 2e-5, base.bias)
    x = torch.randn(4, layer.in_features)
    before = layer(x)
    layer.merge()
    assert type(layer.base_layer) is nn.Linear
    assert error(layer(x), before.double()) < 2e-5
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_a_layer_that_is_not_linear_is_refused_by_name():
    with pytest.raises(TypeError, match=r"block\.layer: cannot adapt a LayerNorm; expected a linear layer"):
        adapted(nn.LayerNorm(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value):
    base = linear(SHAPES["tall"])
    with torch.no_grad():
        base.weight[3, 4] = value
    with pytest.raises(
        ValueError, match=r"block\.layer: its weight holds 1 NaN or Inf values of 6144; expected finite"
    ):
        adapted(base)


@EACH_FORM
def test_a_weight_of_zeros_gives_finite_outputs_and_gradients(form):
    """The one-sided form, which multiplies with W, then adds nothing; the other one has 1 as its unit."""
    base = linear(SHAPES["square"])
    nn.init.zeros_(base.weight)
    layer = adapted(base, **form)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert torch.isfinite(y).all()
    assert torch.equal(y, base(x)) is (layer.settings["default"].sides == "one")
    assert all(torch.isfinite(g).all() for g in gradients(y, layer, x))


@EACH_FORM
def test_zero_singular_values_give_finite_outputs(form):
    base = linear(SHAPES["tall"], bias=False)
    with torch.no_grad():
        base.weight[:, 10:] = 0
    layer = adapted(base, **form)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in gradients(y, layer, x))


@EACH_FORM
def test_a_deep_copy_has_the_same_outputs_and_shares_nothing(form):
    layer = adapted(linear(SHAPES["wide"]), **form)
    twin = copy.deepcopy(layer)
    x = torch.randn(4, layer.in_features)
    before = layer(x)
    assert torch.equal(twin(x), before)
    fill(twin, "default", seed=8)
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)
    twin.M("default").data = twin.M("default").data.bfloat16()
    assert twin.M("default").dtype == torch.float32


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "dense"])
@pytest.mark.parametrize(("shape", "sides"), [("tall", "one"), ("wide", "one"), ("tall", "both")])
def test_the_compiled_layer_has_the_eager_outputs_and_gradients(shape, sides, pattern):
    torch._dynamo.reset()
    layer = adapted(linear(SHAPES[shape]), sides=sides, pattern=pattern)
    x = torch.randn(6, layer.in_features, requires_grad=True)
    eager = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert error(compiled, eager.double()) < 1e-6
    for ours, theirs in zip(gradients(compiled, layer, x), gradients(eager, layer, x), strict=True):
        assert error(ours, theirs.double()) < 1e-6


def test_what_it_gives_may_be_changed_in_place_in_training(llama):
    """Wav2Vec2 puts masks into the output of a layer."""
    form = {"sides": "one", "pattern": "banded", "off_diagonals": 2}
    model = qsvft.prepare(load(llama, torch.float32, attention_bias=True), 4, progress=False, **form)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    y = layer(torch.randn(2, 3, 64))
    y[:, 0] = 1.0
    y.sum().backward()
    assert layer.M("default").grad.any()
