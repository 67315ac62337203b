"""The three adapted maps against fp64, against the naive formula, and what autograd keeps of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from dense_basis import DenseBasis
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsvft.maths.decomposition import decompose
from qsvft.maths.patterns import DensePattern, Pattern, banded, plain, random_entries, top_entries
from qsvft.maths.updates import (
    TAIL_DAMPING,
    bounded_inverse,
    input_side_update,
    output_side_update,
    sparse_update,
    two_sided_update,
    unit_of,
)
from qsvft.options.choices import PATTERNS

LOW = [torch.float32, torch.bfloat16, torch.float16]
# form, outputs m, inputs n, rank k
SHAPES = [
    ("input", 507, 252, 252),
    ("input", 96, 96, 64),
    ("output", 252, 507, 190),
    ("output", 65, 130, 65),
    ("both", 252, 507, 252),
    ("both", 507, 252, 130),
]
SMALL = [("input", 7, 6, 5), ("output", 6, 9, 6), ("both", 7, 5, 5), ("both", 5, 8, 4)]


def make_pattern(name: str, U: Tensor, V: Tensor, d: int = 3) -> Pattern:
    rank = U.shape[0]
    if name == "plain":
        return plain(rank)
    if name == "banded":
        return banded(rank, d)
    if name == "dense":
        return DensePattern(rank)
    return random_entries(rank, d, "0") if name == "random" else top_entries(U, V, d)


def make_problem(m: int, n: int, k: int, pattern: str, dtype: torch.dtype, lead: tuple[int, ...] = (33,), d: int = 3):
    """Weight, factors, M, activation x and output gradient g; held as a layer holds them in this dtype."""
    generator = torch.Generator().manual_seed(m * n + k)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    W = (noise(m, n) / n**0.5).to(dtype)
    parts = decompose(W, k, "both")
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.bfloat16
    values_dtype = torch.promote_types(dtype, torch.float32)
    chosen = make_pattern(pattern, parts.U, parts.V, d)
    rms = parts.s.square().mean().sqrt().to(values_dtype)
    return SimpleNamespace(
        W=W,
        U=parts.U.to(factor_dtype),
        V=parts.V.to(factor_dtype),
        scale=bounded_inverse(parts.s.to(values_dtype), rms),
        values=(noise(chosen.count) / 3).to(values_dtype),
        pattern=chosen,
        x=noise(*lead, n).to(dtype),
        g=noise(*lead, m).to(dtype),
    )


def ours(form: str, p: SimpleNamespace, x: Tensor, values: Tensor) -> Tensor:
    if form == "input":
        return input_side_update(x, x, DenseBasis(p.V), p.scale, values, p.pattern) @ p.W.T
    y = x @ p.W.T
    if form == "output":
        return output_side_update(y, y, DenseBasis(p.U), p.scale, values, p.pattern)
    return two_sided_update(y, x, DenseBasis(p.U), DenseBasis(p.V), values, p.pattern)


def naive(form: str, p: SimpleNamespace, x: Tensor, values: Tensor) -> Tensor:
    """Each form as it is written in the paper's symbols: dense M, plain matrix products, autograd."""
    U, V, S_inverse = p.U.to(x.dtype), p.V.to(x.dtype), p.scale.to(x.dtype)
    M = p.pattern.dense(values.to(x.dtype))
    if form == "input":
        return (x + x @ V.T @ (S_inverse[:, None] * M).T @ V) @ p.W.T
    y = x @ p.W.T
    if form == "output":
        return y + y @ U.T @ (M * S_inverse).T @ U
    return y + x @ V.T @ M.T @ U


def output_and_gradients(f: Callable[..., Tensor], form: str, p: SimpleNamespace) -> dict[str, Tensor]:
    x, values = p.x.clone().requires_grad_(), p.values.clone().requires_grad_()
    y = f(form, p, x, values)
    y.backward(p.g)
    return {"y": y.detach(), "gradient of x": x.grad, "gradient of M": values.grad}


def in_double(p: SimpleNamespace) -> SimpleNamespace:
    doubled = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(p).items()}
    return SimpleNamespace(**doubled)


def error(found: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - truth) / torch.linalg.vector_norm(truth))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_rows_of_ones_in_units_of_the_weight_sum_to_a_typical_direction_of_it(pattern):
    p = make_problem(20, 50, 7, pattern, torch.float64, d=2)
    length = torch.linalg.matrix_norm(p.W)
    M = p.pattern.dense(unit_of(length, p.pattern.count, 7).double() * torch.ones_like(p.values))
    torch.testing.assert_close(M.sum(1).mean(), length / 7**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", [DensePattern(30), plain(30)], ids=["dense", "plain"])
def test_where_all_entries_move_together_the_weight_changes_by_its_own_size(pattern):
    """The largest change of a unit vector is the root mean square of |W v|."""
    length = torch.tensor(4.0, dtype=torch.float64)
    M = pattern.dense(unit_of(length, pattern.count, 30).double() * torch.ones(pattern.count, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.matrix_norm(M, 2), length / 30**0.5, rtol=1e-6, atol=0)


def test_a_weight_of_zeros_has_the_unit_one():
    assert unit_of(torch.tensor(0.0), 5, 5) == 1


EACH_PATTERN = pytest.mark.parametrize("pattern", PATTERNS)
EACH_SMALL_SHAPE = pytest.mark.parametrize(("form", "m", "n", "k"), SMALL)


@pytest.mark.parametrize(("form", "m", "n", "k"), SHAPES)
@EACH_PATTERN
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_error_against_fp64_is_no_worse_than_that_of_the_naive_formula(form, m, n, k, pattern, dtype):
    p = make_problem(m, n, k, pattern, dtype)
    truth = output_and_gradients(naive, form, in_double(p))
    found, reference = output_and_gradients(ours, form, p), output_and_gradients(naive, form, p)
    for name, true in truth.items():
        allowed = 1.1 * error(reference[name], true) + 0.2 * torch.finfo(dtype).eps
        assert error(found[name], true) <= allowed, name


@pytest.mark.parametrize(("form", "m", "n", "k"), SHAPES)
@EACH_PATTERN
def test_in_fp64_it_is_the_naive_formula(form, m, n, k, pattern):
    p = make_problem(m, n, k, pattern, torch.float64, lead=(300,), d=9)
    found, truth = (output_and_gradients(f, form, p) for f in (ours, naive))
    for name, true in truth.items():
        torch.testing.assert_close(found[name], true, rtol=1e-10, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@EACH_SMALL_SHAPE
@EACH_PATTERN
def test_gradcheck(form, m, n, k, pattern):
    p = make_problem(m, n, k, pattern, torch.float64, lead=(3,), d=2)
    inputs = (p.x.requires_grad_(), p.values.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, values: ours(form, p, x, values), inputs)
    assert torch.autograd.gradgradcheck(lambda x, values: ours(form, p, x, values), inputs)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["input", "output", "both"]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.data(),
    st.sampled_from(PATTERNS),
)
def test_any_shape_rank_and_band_gives_the_naive_formula(form, shape, data, pattern):
    m, n = {"input": (max(shape), min(shape)), "output": (min(shape), max(shape)), "both": shape}[form]
    k = data.draw(st.integers(1, min(m, n)), label="k")
    d = data.draw(st.integers(0, min(k - 1, 12)), label="d")
    tokens = data.draw(st.integers(1, 9), label="tokens")
    p = make_problem(m, n, k, pattern, torch.float64, lead=(tokens,), d=d)
    found, truth = (output_and_gradients(f, form, p) for f in (ours, naive))
    for name, true in truth.items():
        torch.testing.assert_close(found[name], true, rtol=1e-9, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("form", "m", "n", "k"), SHAPES)
@EACH_PATTERN
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_zero_M_gives_the_base_bit_for_bit(form, m, n, k, pattern, dtype):
    p = make_problem(m, n, k, pattern, dtype, lead=(5,))
    y = ours(form, p, p.x, torch.zeros_like(p.values))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(y.view(bits), (p.x @ p.W.T).view(bits))


@EACH_SMALL_SHAPE
@EACH_PATTERN
def test_zero_M_still_gets_a_gradient(form, m, n, k, pattern):
    p = make_problem(m, n, k, pattern, torch.float64, d=2)
    values = torch.zeros_like(p.values).requires_grad_()
    ours(form, p, p.x, values).backward(p.g)
    assert bool((values.grad != 0).all())


@EACH_SMALL_SHAPE
@pytest.mark.parametrize("lead", [(), (4,), (3, 4), (2, 3, 4), (1, 1, 1)], ids=str)
def test_batch_dimensions_are_only_a_way_to_lay_out_tokens(form, m, n, k, lead):
    p = make_problem(m, n, k, "banded", torch.float64, lead, d=2)
    y = ours(form, p, p.x, p.values)
    assert y.shape == (*lead, m)
    flat = ours(form, p, p.x.reshape(-1, n), p.values)
    torch.testing.assert_close(y.reshape(-1, m), flat)


@EACH_SMALL_SHAPE
@EACH_PATTERN
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens_give_an_empty_output_and_zero_gradients(form, m, n, k, pattern, lead, dtype):
    p = make_problem(m, n, k, pattern, dtype, lead, d=2)
    found = output_and_gradients(ours, form, p)
    assert found["y"].shape == (*lead, m) and found["y"].dtype == dtype
    assert found["gradient of x"].shape == (*lead, n)
    assert torch.equal(found["gradient of M"], torch.zeros_like(p.values))


@EACH_SMALL_SHAPE
def test_strided_activations_give_the_same_as_contiguous_ones(form, m, n, k):
    p = make_problem(m, n, k, "banded", torch.float64, (4, 6), d=2)
    expected = output_and_gradients(ours, form, p)
    p.x, p.g = p.x.transpose(0, 1).contiguous().transpose(0, 1), p.g.transpose(0, 1).contiguous().transpose(0, 1)
    assert not p.x.is_contiguous()
    for name, found in output_and_gradients(ours, form, p).items():
        torch.testing.assert_close(found, expected[name])


@EACH_PATTERN
def test_update_read_in_a_lower_dtype_is_added_in_the_dtype_of_the_base(pattern):
    """As under autocast: the base in fp32, the update computed in bf16."""
    p = make_problem(60, 40, 40, pattern, torch.float32)
    base, x = p.g.clone().requires_grad_(), p.x.bfloat16()
    values = p.values.clone().requires_grad_()
    y = two_sided_update(base, x, DenseBasis(p.U), DenseBasis(p.V), values, p.pattern)
    update = two_sided_update(
        torch.zeros_like(base, dtype=torch.bfloat16), x, DenseBasis(p.U), DenseBasis(p.V), values, p.pattern
    )
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, base + update.float())
    y.sum().backward()
    assert torch.equal(base.grad, torch.ones_like(base)) and values.grad.dtype == torch.float32


@pytest.mark.parametrize(("form", "m", "n", "k"), [s for s in SHAPES if s[0] != "both"])
@EACH_PATTERN
def test_one_sided_equals_two_sided_in_exact_arithmetic_without_damping(form, m, n, k, pattern):
    p = make_problem(m, n, k, pattern, torch.float64)
    p.scale = 1 / decompose(p.W, k).s
    one, two = (output_and_gradients(ours, f, p) for f in (form, "both"))
    for name, found in one.items():
        assert error(found, two[name]) < 1e-9, name


@pytest.mark.parametrize("form", ["input", "output"])
def test_damping_shrinks_only_the_directions_under_tau_rms_and_drops_none(form):
    """One direction of M at a time: its share in dW is full above tau * rms and in (0, 1) below."""
    p = make_problem(40, 40, 40, "plain", torch.float64)
    s = decompose(p.W, 40).s
    rms = s.square().mean().sqrt()
    p.scale = bounded_inverse(s, rms)
    below = s < TAIL_DAMPING * rms
    assert 0 < int(below.sum()) < 40
    p.x = torch.eye(40, dtype=torch.float64)
    p.values = torch.ones(40, dtype=torch.float64)
    dW = (ours(form, p, p.x, p.values) - p.x @ p.W.T).T
    share = torch.diagonal(p.U @ dW @ p.V.T)
    torch.testing.assert_close(share[~below], torch.ones_like(share[~below]))
    torch.testing.assert_close(share[below], (s / (TAIL_DAMPING * rms))[below])
    assert bool((share > 0).all())


@settings(max_examples=60, deadline=None)
@example([0.0, 1.0], 1e-33)
@example([1e-40], 1e-40)
@given(
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=8),
    st.floats(0, 2.0**100, width=32),
)
def test_scale_is_never_infinite_nor_nan_nor_negative(s, rms):
    scale = bounded_inverse(torch.tensor(s), torch.tensor(rms))
    assert bool(torch.isfinite(scale).all()) and bool((scale >= 0).all())


def test_scale_is_the_inverse_above_the_floor_and_constant_below():
    s = torch.tensor([3.0, 1.0, 0.4, 0.09, 0.02, 0.0])
    rms = s.square().mean().sqrt()
    scale, floor = bounded_inverse(s, rms), TAIL_DAMPING * rms
    torch.testing.assert_close(scale, torch.where(s > floor, 1 / s, 1 / floor))
    assert bool((scale.diff() >= 0).all())


def test_zero_weight_has_zero_scale():
    assert torch.equal(bounded_inverse(torch.zeros(4), torch.tensor(0.0)), torch.zeros(4))


@pytest.mark.parametrize(("form", "m", "n"), [("input", 30, 20), ("output", 20, 30)])
@pytest.mark.parametrize("rank_of_W", [0, 1, 7])
def test_rank_deficient_weights_give_finite_outputs_and_gradients(form, m, n, rank_of_W):
    p = make_problem(m, n, 20, "banded", torch.float32)
    left, right = torch.randn(m, rank_of_W), torch.randn(rank_of_W, n)
    p.W = left @ right
    parts = decompose(p.W, 20)
    p.U, p.V = parts.U, parts.V
    s = parts.s.float()
    p.scale = bounded_inverse(s, s.square().mean().sqrt())
    for name, found in output_and_gradients(ours, form, p).items():
        assert bool(torch.isfinite(found).all()), name


@pytest.mark.parametrize(("form", "m", "n", "k"), [("input", 60, 40, 30), ("output", 40, 60, 30), ("both", 60, 50, 30)])
@EACH_PATTERN
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autograd_keeps_h_in_the_compute_dtype_and_nothing_else_that_is_new(form, m, n, k, pattern, dtype):
    """Beside h only what is held anyway: no activation, no factor cast to another dtype, no dense M."""
    p = make_problem(m, n, k, pattern, dtype, lead=(2, 70))
    y = (p.x @ p.W.T).requires_grad_()
    x, values = p.x.requires_grad_(), p.values.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        if form == "input":
            input_side_update(x, x, DenseBasis(p.V), p.scale, values, p.pattern)
        elif form == "output":
            output_side_update(y, y, DenseBasis(p.U), p.scale, values, p.pattern)
        else:
            two_sided_update(y, x, DenseBasis(p.U), DenseBasis(p.V), values, p.pattern)

    held = [p.U, p.V, p.scale, values, *p.pattern.buffers()]
    new = [t for t in kept if all(t.data_ptr() != other.data_ptr() for other in held)]
    assert [(tuple(t.shape), t.dtype) for t in new] == [((140, k), dtype)]
    assert all(t.data_ptr() not in (x.data_ptr(), y.data_ptr()) for t in kept)


@EACH_PATTERN
def test_inputs_are_not_changed(pattern):
    p = make_problem(50, 40, 30, pattern, torch.bfloat16)
    before = {k: v.clone() for k, v in vars(p).items() if isinstance(v, Tensor)}
    for form in ("input", "both"):
        output_and_gradients(ours, form, p)
    for name, old in before.items():
        assert torch.equal(getattr(p, name), old), name


@pytest.mark.parametrize(("form", "m", "n", "k"), [("input", 60, 40, 30), ("output", 40, 60, 30), ("both", 60, 50, 30)])
@pytest.mark.parametrize("pattern", ["plain", "banded", "random"])
def test_compiled_in_one_graph_it_gives_the_same_results(form, m, n, k, pattern):
    torch.compiler.reset()
    p = make_problem(m, n, k, pattern, torch.float32, lead=(2, 7))
    compiled = torch.compile(lambda x, values: ours(form, p, x, values), backend="aot_eager", fullgraph=True)
    found = output_and_gradients(lambda _form, _p, x, values: compiled(x, values), form, p)
    for name, expected in output_and_gradients(ours, form, p).items():
        torch.testing.assert_close(found[name], expected, msg=lambda m, name=name: f"{name}: {m}")


def test_forms_are_one_map_with_its_factors_exchanged():
    """Reading with V and writing with U on a weight is reading with U and writing with V on its transpose."""
    p = make_problem(30, 20, 20, "banded", torch.float64)
    M_transposed = p.pattern.dense(p.values).T[p.pattern.indices()]
    forward = sparse_update(torch.zeros_like(p.g), p.x, DenseBasis(p.V), DenseBasis(p.U), p.values, p.pattern)
    backward = sparse_update(torch.zeros_like(p.x), p.g, DenseBasis(p.U), DenseBasis(p.V), M_transposed, p.pattern)
    torch.testing.assert_close((forward * p.g).sum(), (backward * p.x).sum())
