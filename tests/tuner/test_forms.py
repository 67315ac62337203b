"""Every way of holding a basis, in every form: the maps that the held numbers define, whatever is done with them."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, same_tensors, tokens
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import qsvft
from qsvft import QSVFTConfig
from qsvft.tuner import QSVFTLinear
from qsvft.tuner.form import form_of

SHAPES = {"tall": (96, 64), "wide": (64, 96), "square": (64, 64), "odd": (37, 50)}
WAYS = [
    {"factor_bits": bits, "sides": sides, "rank": rank}
    for bits, sides, rank in itertools.product((16, 8, 4), ("one", "both"), (None, 24))
]
LEAN = [way for way in WAYS if way != {"factor_bits": 16, "sides": "one", "rank": None}]
BANDED = {"pattern": "banded", "off_diagonals": 4}
DENSE = [{**way, "pattern": "dense"} for way in WAYS if way.get("rank") is not None]
DEFAULT = {"sides": "both", "pattern": "dense", "rank": None}
EACH_WAY = pytest.mark.parametrize("way", [*WAYS, *DENSE, DEFAULT], ids=str)
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES)


def adapted(shape: str, dtype=torch.float32, bias: bool = True, **options) -> QSVFTLinear:
    torch.manual_seed(0)
    m, n = SHAPES[shape]
    base = nn.Linear(n, m, bias=bias).to(dtype)
    layer = QSVFTLinear(base, "default", QSVFTConfig(**{**BANDED, **options}), "block.layer")
    with torch.no_grad():
        M = layer.M("default")
        M.copy_(torch.randn(M.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return layer


def dense_delta(layer: QSVFTLinear, values: torch.Tensor, name: str = "default") -> torch.Tensor:
    """dW from the numbers that the layer holds, by the formulas, fp64, differentiable in M."""
    form, pattern = layer.forms[name], layer.pattern(name)
    M = pattern.dense(values)
    inward, outward = (layer.basis(key).dense(torch.float64, pattern.rank) for key in (form.inward, form.outward))
    if form.kind == "both":
        return outward.T @ (layer.units[name] * M) @ inward
    W, scale = layer.original_weight().double(), layer.qsvft_scale[name].double()
    if form.kind == "input":
        return W @ inward.T @ (scale[:, None] * M) @ inward
    return inward.T @ (M * scale) @ inward @ W


@EACH_WAY
@EACH_SHAPE
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_numbers_held(shape, way, bias):
    layer = adapted(shape, bias=bias, **way)
    x, g = torch.randn(7, layer.in_features), torch.randn(7, layer.out_features)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    grad_x, grad_M = torch.autograd.grad(y, (leaf, layer.M("default")), g)
    values = layer.M("default").detach().double().requires_grad_()
    exact_leaf = x.double().requires_grad_()
    exact = exact_leaf @ (layer.original_weight().double() + dense_delta(layer, values)).T
    if bias:
        exact = exact + layer.base_layer.bias.double()
    exact_x, exact_M = torch.autograd.grad(exact, (exact_leaf, values), g.double())
    for found, expected in ((y, exact), (grad_x, exact_x), (grad_M, exact_M)):
        assert float((found.double() - expected).norm().detach() / expected.norm().detach()) < 1e-5


@EACH_WAY
@EACH_SHAPE
def test_in_bf16_the_error_is_that_of_the_naive_formula(shape, way):
    layer = adapted(shape, torch.bfloat16, bias=False, **way)
    x = torch.randn(200, layer.in_features).bfloat16()
    values = layer.M("default").detach().double()
    W = layer.original_weight().double()
    exact = x.double() @ (W + dense_delta(layer, values)).T
    naive = x @ (W + dense_delta(layer, values)).bfloat16().T
    with torch.no_grad():
        ours, theirs = (float((y.double() - exact).norm() / exact.norm()) for y in (layer(x), naive))
    assert ours < 4 * theirs + 1e-3


@EACH_WAY
@EACH_SHAPE
def test_merging_gives_the_adapters_map_and_unmerging_the_base_bit_for_bit(shape, way):
    layer = adapted(shape, **way)
    x, W = torch.randn(5, layer.in_features), layer.base_layer.weight.clone()
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, W)


@EACH_WAY
@EACH_SHAPE
def test_with_M_at_zero_it_is_the_base_bit_for_bit(shape, way):
    layer = adapted(shape, torch.bfloat16, **way)
    x = torch.randn(5, layer.in_features).bfloat16()
    with torch.no_grad():
        layer.M("default").zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("way", WAYS, ids=str)
@EACH_SHAPE
@pytest.mark.parametrize("pattern", ["banded", "plain", "random", "dense"])
def test_for_the_backward_it_keeps_h_in_the_compute_dtype_and_nothing_else(shape, way, pattern):
    """Of everything that lives between forward and backward and is not held anyway: (tokens, k) once."""
    layer = adapted(shape, torch.bfloat16, bias=False, pattern=pattern, **way)
    layer.base_layer.requires_grad_(False)
    held = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    x, kept = torch.randn(30, layer.in_features).bfloat16().requires_grad_(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert [(t.shape, t.dtype) for t in kept.values()] == [((30, layer.pattern("default").rank), torch.bfloat16)]
    y.sum().backward()
    assert layer.M("default").grad.any()


OURS = "M was changed in place between the forward and the backward"
TORCHS = "modified by an inplace operation"  # of a tensor that is saved as it is


@pytest.mark.parametrize(
    ("pattern", "sides", "message"),
    [("banded", "one", OURS), ("banded", "both", OURS), ("dense", "one", OURS), ("dense", "both", TORCHS)],
)
def test_changing_M_between_forward_and_backward_is_refused(pattern, sides, message):
    layer = adapted("tall", pattern=pattern, sides=sides)
    y = layer(torch.randn(3, 64).requires_grad_())
    with torch.no_grad():
        layer.M("default").add_(1)
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


@pytest.mark.parametrize("other", [*LEAN, *DENSE, DEFAULT], ids=str)
@EACH_SHAPE
def test_adapters_held_in_different_ways_add_up(shape, other):
    layer = adapted(shape, sides="one")
    layer.update_layer("other", QSVFTConfig(**{**BANDED, "off_diagonals": 2, **other}))
    with torch.no_grad():
        layer.M("other").normal_(0, 0.2)
    layer.set_adapter(["default", "other"])
    x = torch.randn(5, layer.in_features)
    delta = sum(dense_delta(layer, layer.M(name).double(), name) for name in ("default", "other"))
    exact = x.double() @ (layer.original_weight().double() + delta).T + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("pattern", ["banded", "dense"])
def test_a_larger_rank_adds_directions_and_leaves_the_first_adapters_map(bits, sides, pattern):
    layer = adapted("tall", rank=10, factor_bits=bits, sides=sides, pattern=pattern)
    x = torch.randn(5, 64)
    before = layer(x)
    layer.update_layer("larger", QSVFTConfig(rank=40, factor_bits=bits, sides=sides, pattern=pattern))
    assert {basis.rank for basis in layer.qsvft_bases.values()} == {40}
    assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)


def test_adapters_that_agree_hold_one_basis_and_others_their_own():
    layer = adapted("tall", sides="one")
    for name, options in (
        ("same", {"sides": "one"}),
        ("both", {"pattern": "banded"}),
        ("dense", {}),
        ("nf4", {"sides": "one", "factor_bits": 4}),
    ):
        layer.update_layer(name, QSVFTConfig(**options))
    assert set(layer.qsvft_bases) == {"V_bf16", "U_bf16", "V_int8", "U_int8", "V_nf4"}


def test_by_default_each_layer_holds_both_factors(llama):
    adapted = [m for m in qsvft.prepare(load(llama), bits=4).modules() if isinstance(m, QSVFTLinear)]
    assert {tuple(layer.qsvft_bases) for layer in adapted} == {("V_int8", "U_int8")}
    assert len({id(basis) for layer in adapted for basis in layer.qsvft_bases.values()}) == 28


OTHERS = [{}, {"factor_bits": 4}, {"factor_bits": 4, "sides": "one", "pattern": "banded"}, {"pattern": "top_k"}]


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("way", [{"factor_bits": 4, "sides": "one"}, {}], ids=str)
def test_a_deleted_adapter_leaves_nothing_behind_and_takes_nothing_of_another(llama, way, other):
    model = qsvft.prepare(load(llama), bits=4, **way)
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    bytes_before = qsvft.held_bytes(model)
    model.add_adapter("other", QSVFTConfig(task_type="CAUSAL_LM", **other))
    model.delete_adapter("other")
    layer = next(m for m in model.modules() if isinstance(m, QSVFTLinear))
    assert list(layer.qsvft_scale) == ([] if way == {} else ["default"])
    for kept in (layer.qsvft_M, layer.qsvft_pattern, layer.settings, layer.forms):
        assert list(kept) == ["default"]
    assert qsvft.held_bytes(model) == bytes_before
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), expected)


def test_after_the_last_adapter_no_factor_is_held_and_a_new_one_is_attached(llama):
    model = qsvft.prepare(load(llama), bits=4)
    model.add_adapter("other", QSVFTConfig(task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="default"):
        model.delete_adapter("default")
    base = logits(model)
    model.delete_adapter("other")
    assert qsvft.held_bytes(model)["factors"] == qsvft.held_bytes(model)["M"] == 0
    model.add_adapter("new", QSVFTConfig(task_type="CAUSAL_LM"))
    model.set_adapter("new")
    assert torch.equal(logits(model), base)
    assert not torch.equal(logits(randomize(model, "new")), base)


def on_llama(way: dict) -> dict:
    """One-sided and banded where nothing else is asked for."""
    return {**BANDED, "sides": "one", **way}


SAVED = [*LEAN, {"factor_bits": 4, "pattern": "top_k", "rank": 30}, {"pattern": "random"}, DEFAULT]


@pytest.mark.parametrize("way", SAVED, ids=str)
def test_a_saved_adapter_reloads_bitwise_the_same(llama, tmp_path, way):
    model = randomize(qsvft.prepare(load(llama), bits=4, **on_llama(way)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qsvft.quantize(load(llama), 4), tmp_path)
    assert same_tensors(coefficients(again), coefficients(model))
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("way", [{"factor_bits": 16}, {"factor_bits": 4}], ids=str)
def test_an_adapter_read_with_another_basis_is_refused(llama, tmp_path, way):
    model = randomize(qsvft.prepare(load(llama), bits=4, rank=32, **on_llama(way)))
    model.save_pretrained(tmp_path)
    config = QSVFTConfig.from_pretrained(str(tmp_path))
    config.factor_bits = 8
    with pytest.raises(ValueError, match="contents do not match their digest: its file or config was changed"):
        PeftModel.from_pretrained(qsvft.quantize(load(llama), 4), tmp_path, config=config)


def test_keys_name_the_side_and_the_holding():
    def keys(shape, **options):
        return form_of(QSVFTConfig(**options), shape, 8).keys

    assert keys((9, 9)) == keys((8, 9)) == ("V_int8", "U_int8")
    assert keys((9, 9), **BANDED) == keys((9, 9), factor_bits=16) == ("V_bf16", "U_bf16")
    assert keys((9, 9), sides="one") == ("V_int8",) and keys((8, 9), sides="one") == ("U_int8",)
    assert keys((8, 9), sides="both", factor_bits=4) == ("V_nf4", "U_nf4")
    assert keys((8, 9), sides="both", factor_bits=8, residual=True) == ("V_int8_original", "U_int8_original")
    assert keys((8, 9), basis="data") == keys((8, 9), basis="data", **BANDED) == ("V_int8_data_8", "U_int8_data_8")


@pytest.mark.parametrize("way", [*LEAN, {"sides": "both", "residual": True}, DEFAULT], ids=str)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_few_steps_lower_the_loss(llama, way, checkpointing):
    model = qsvft.prepare(load(llama), bits=4, gradient_checkpointing=checkpointing, **on_llama(way)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
