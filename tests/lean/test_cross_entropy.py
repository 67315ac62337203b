"""The chunked cross-entropy against the plain one: values, gradients, edge cases and bytes."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsvft.lean import cross_entropy as loss_module
from qsvft.lean.cross_entropy import LogitStep, chunked_cross_entropy
from qsvft.memory.ledger import Ledger

TOKENS, VOCABULARY, WIDTH = 999, 1003, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SOFTCAP = (LogitStep("divide", 5.0), LogitStep("tanh"), LogitStep("multiply", 5.0))
STEPS = {
    "softcap": SOFTCAP,
    "multiply": (LogitStep("multiply", 0.3),),
    "divide": (LogitStep("divide", 3.0),),
    "tanh last": (LogitStep("cast", torch.float32), LogitStep("tanh")),
    "cast between": (LogitStep("multiply", 0.5), LogitStep("cast", torch.float32), LogitStep("divide", 1.5)),
}


class Stored:
    """A frozen weight held in another form; remembers how many rows were asked for at once."""

    def __init__(self, weight):
        self._weight = weight.detach().float()
        self.rows, self.columns = weight.shape
        self.asked = []

    def dense(self, dtype, start=0, stop=None):
        rows = self._weight[start:stop].to(dtype)
        self.asked.append(rows.shape[0])
        return rows


def operands(dtype=torch.float32, tokens=TOKENS, requires_grad=True, ignored=0.2, device="cpu"):
    hidden = torch.randn(tokens, WIDTH).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.5).to(dtype)
    bias = torch.randn(VOCABULARY).to(dtype)
    labels = torch.randint(0, VOCABULARY, (tokens,)).masked_fill(torch.rand(tokens) < ignored, -100)
    leaves = [t.to(device).requires_grad_(requires_grad) for t in (hidden, weight, bias)]
    return *leaves, labels.to(device)


def plain(hidden, weight, bias, labels, steps=(), **options):
    logits = F.linear(hidden, weight, bias)
    for step in steps:
        logits = step(logits)
    return F.cross_entropy(logits if hidden.dtype == torch.float64 else logits.float(), labels, **options)


def gradients(loss, *leaves):
    loss.backward()
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def assert_no_worse_than_plain(ours, theirs, exact, factor=1.5):
    """Our error against fp64 is that of the plain formula in the same dtype, times a small factor."""
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype
        floor = 1e-6 * float(true.norm())
        assert float((our.double() - true).norm()) <= factor * float((their.double() - true).norm()) + floor


def exact_gradients(leaves, labels, bias=True, **options):
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    operands = doubles if bias else [*doubles, None]
    steps = [s if s.kind != "cast" else LogitStep("cast", torch.float64) for s in options.pop("steps", ())]
    return gradients(plain(*operands, labels, steps=steps, **options), *doubles)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_are_those_of_the_plain_formula(dtype, smoothing, reduction):
    *leaves, labels = operands(dtype)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    theirs = plain(*leaves, labels, **options)
    ours = chunked_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=0)
    if dtype == torch.float16 and reduction == "mean":
        ours, theirs = ours * 1024, theirs * 1024  # as a loss scaler would; else the plain gradients are lost
        exact = [1024 * g for g in exact_gradients(leaves, labels, **options)]
    else:
        exact = exact_gradients(leaves, labels, **options)
    assert_no_worse_than_plain(gradients(ours, *leaves), gradients(theirs, *leaves), exact)


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 512])
def test_no_token_is_lost_at_the_edge_of_a_chunk(tokens):
    *leaves, labels = operands(tokens=tokens, ignored=0)
    ours = chunked_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2])
    theirs = plain(*leaves, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for our, their in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_steps_between_head_and_loss_have_the_models_roundings_and_gradients(steps, dtype):
    *leaves, labels = operands(dtype)
    options = {"steps": steps, "reduction": "sum"}
    theirs = plain(*leaves, labels, **options)
    ours = chunked_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    exact = exact_gradients(leaves, labels, **options)
    assert_no_worse_than_plain(gradients(ours, *leaves), gradients(theirs, *leaves), exact)


@pytest.mark.parametrize("steps", [(), SOFTCAP], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stored_weight_is_made_dense_in_slices_and_gives_the_same(monkeypatch, dtype, steps):
    monkeypatch.setattr(loss_module, "ROWS", 100)
    *leaves, labels = operands(dtype)
    hidden, weight, bias = leaves
    stored = Stored(weight)
    ours = chunked_cross_entropy(hidden, stored, labels, bias=bias, steps=steps, reduction="sum")
    theirs = plain(*leaves, labels, steps=steps, reduction="sum")
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=0)
    found = [gradients(loss, hidden, bias) for loss in (ours, theirs)]
    true, _, true_bias = exact_gradients(leaves, labels, steps=steps, reduction="sum")
    assert_no_worse_than_plain(*found, [true, true_bias])
    assert max(stored.asked) == 100 and sum(stored.asked) == 8 * VOCABULARY


@pytest.mark.parametrize("steps", [(), SOFTCAP], ids=["plain", "softcap"])
def test_any_head_gets_the_gradients_of_all_its_parameters(steps):
    hidden, *_, labels = operands()
    head = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, VOCABULARY))
    leaves = [hidden, *head.parameters()]
    ours = chunked_cross_entropy(hidden, head, labels, steps=steps, label_smoothing=0.1)
    logits = head(hidden)
    for step in steps:
        logits = step(logits)
    theirs = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for our, their in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        alone = chunked_cross_entropy(hidden, head, labels, steps=steps, label_smoothing=0.1)
    torch.testing.assert_close(alone, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_product_is_that_of_the_plain_head(monkeypatch, hidden_dtype, weight_dtype):
    monkeypatch.setattr(loss_module, "ROWS", 300)
    hidden, weight, bias, labels = operands()
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    weight, bias = (t.detach().to(weight_dtype).requires_grad_() for t in (weight, bias))
    leaves = [hidden, weight, bias]
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_cross_entropy(hidden, weight, labels, bias=bias)
        theirs = plain(*leaves, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    exact = exact_gradients(leaves, labels)
    assert_no_worse_than_plain(gradients(ours, *leaves), gradients(theirs, *leaves), exact)


def test_the_gradient_of_a_scaled_fp16_loss_does_not_underflow():
    """Over many tokens the entries of softmax / tokens are below fp16; the factor of a loss scaler lifts them."""
    hidden, weight, bias, labels = operands(torch.float16, ignored=0)
    items, scale = 10**6, 2.0**16
    loss = chunked_cross_entropy(hidden, weight, labels, bias=bias, reduction="sum") / items
    ours = [g.double() / scale for g in gradients(loss * scale, hidden, weight, bias)]
    exact = [g / items for g in exact_gradients([hidden, weight, bias], labels, reduction="sum")]
    for our, true in zip(ours, exact, strict=True):
        assert float((our - true).norm()) < 3e-3 * float(true.norm())


def test_a_small_factor_from_above_is_not_rounded_to_fp16():
    """As a subnormal of fp16 it would be off by percents; the gradient itself, about 64 times as large, is none."""
    hidden, weight, _, labels = operands(torch.float16, ignored=0)
    hidden, weight = (hidden.detach() / 64).requires_grad_(), weight.detach() * 64
    factor = 20.5 * 2.0**-24  # between two numbers of fp16
    (ours,) = gradients(chunked_cross_entropy(hidden, weight, labels, reduction="sum") * factor, hidden)
    true, _ = exact_gradients([hidden, weight], labels, reduction="sum", bias=False)
    assert float((ours.double() - factor * true).norm()) < 5e-3 * factor * float(true.norm())


@pytest.mark.parametrize("tokens", [0, 300])
def test_where_no_token_counts_the_sum_is_zero_and_the_mean_nan_with_finite_gradients(tokens):
    *leaves, labels = operands(tokens=tokens, ignored=1.1)
    for reduction in ("sum", "mean"):
        ours = chunked_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], reduction=reduction)
        torch.testing.assert_close(ours, plain(*leaves, labels, reduction=reduction), equal_nan=True)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(ours, *leaves))


def test_a_frozen_weight_gets_no_gradient_and_is_not_kept():
    hidden, weight, _, labels = operands()
    frozen = weight.detach().clone()
    loss = chunked_cross_entropy(hidden, frozen, labels)
    reference = weakref.ref(frozen)
    del frozen
    assert reference() is None
    (ours,) = gradients(loss, hidden)
    theirs, _ = gradients(plain(hidden, weight, None, labels), hidden, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_without_gradients_the_loss_alone_is_computed():
    *leaves, labels = operands()
    expected = chunked_cross_entropy(leaves[0], leaves[1], labels)
    for context, tensors in ((torch.no_grad(), leaves), (torch.enable_grad(), [t.detach() for t in leaves])):
        products = []
        with context, _counting(products):
            loss = chunked_cross_entropy(tensors[0], tensors[1], labels)
        assert torch.equal(loss, expected) and not loss.requires_grad
        assert len(products) == 4  # one a chunk: no product for a gradient


def _counting(products):
    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                products.append(func)
            return func(*args, **(kwargs or {}))

    return Products()


def test_a_second_backward_gives_the_same_gradients_and_a_second_order_is_refused():
    *leaves, labels = operands()
    loss = chunked_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2])
    first = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    second = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="create_graph=True, expected gradients of first order"):
        torch.autograd.grad(loss, leaves[0], create_graph=True)


def test_what_does_not_fit_is_refused_with_what_was_found():
    hidden, weight, bias, labels = operands()
    with pytest.raises(ValueError, match=r"the label 1003; expected 0 to 1002, or -100"):
        chunked_cross_entropy(hidden, weight, labels.masked_fill(labels == labels.max(), VOCABULARY))
    with pytest.raises(ValueError, match=r"labels \(998,\); expected"):
        chunked_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"a weight \(1003, 23\).*expected \(V, 24\)"):
        chunked_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="reduction='none'"):
        chunked_cross_entropy(hidden, weight, labels, reduction="none")
    with pytest.raises(ValueError, match="a bias beside a callable head"):
        chunked_cross_entropy(hidden, lambda h: h @ weight.t(), labels, bias=bias)


def counted(vocabulary, tokens, width, steps, device):
    """(peak above the operands, the largest single allocation) of forward and backward, bf16, in bytes."""
    hidden = torch.zeros(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.zeros(vocabulary, width, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(tokens, dtype=torch.long, device=device)
    ledger = Ledger()
    for tensor in (hidden, weight, labels):
        ledger.register(tensor, "other weights")
    held, before = ledger.live_bytes(), len(ledger.events)
    with ledger:
        chunked_cross_entropy(hidden, weight, labels, steps=steps).backward()
    return ledger.high_water() - held, max(event.nbytes for event in ledger.events[before:])


@pytest.mark.parametrize("steps", [(), SOFTCAP], ids=["plain", "softcap"])
@pytest.mark.parametrize("vocabulary", [32000, 128256])
def test_the_peak_is_that_of_one_chunk_and_the_stored_gradient(vocabulary, steps):
    tokens, width = 2048, 4096
    peak, largest = counted(vocabulary, tokens, width, steps, "meta")
    stored = 2 * tokens * width
    assert peak < (10 if steps else 8) * 256 * vocabulary + stored
    assert largest <= 4 * 256 * vocabulary < 2 * tokens * vocabulary


@pytest.mark.parametrize("steps", [(), SOFTCAP], ids=["plain", "softcap"])
def test_real_tensors_have_the_peak_of_meta_tensors(steps):
    assert counted(4096, 600, 64, steps, "cpu") == counted(4096, 600, 64, steps, "meta")
