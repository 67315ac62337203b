"""h is computed once for readers of the same x, and never handed out where it would be another one."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from qsvft.maths.last_input import LastInput


class Counting:
    """x -> 2 x, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * x


@pytest.fixture
def compute() -> Counting:
    return Counting()


def ask(cache: LastInput, compute: Counting, x: torch.Tensor, reader: str, how: tuple = (4,)) -> torch.Tensor:
    return cache.coefficients(x, how, reader, lambda: compute(x))


def test_readers_of_one_tensor_share_one_computation(compute):
    cache, x = LastInput(), torch.randn(3, requires_grad=True)
    q, k, v = (ask(cache, compute, x, reader) for reader in "qkv")
    assert q is k is v and compute.calls == 1


def test_a_reader_who_asks_again_begins_anew(compute):
    """Its first h belongs to a graph whose backward may have run."""
    cache, x = LastInput(), torch.randn(3, requires_grad=True)
    for _ in range(2):
        (ask(cache, compute, x, "q").sum() + ask(cache, compute, x, "k").sum()).backward()
    assert compute.calls == 2 and torch.equal(x.grad, torch.full((3,), 8.0))


def changed_in_place(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


def an_equal_one(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@pytest.mark.parametrize("change", [changed_in_place, an_equal_one])
def test_another_tensor_or_other_values_are_computed_anew(compute, change):
    cache, x = LastInput(), torch.randn(3)
    ask(cache, compute, x, "q")
    other = change(x)
    assert torch.equal(ask(cache, compute, other, "k"), 2 * other) and compute.calls == 2


def test_another_rank_dtype_or_gradient_mode_is_computed_anew(compute):
    cache, x = LastInput(), torch.randn(3, requires_grad=True)
    ask(cache, compute, x, "q", (4, torch.float32))
    ask(cache, compute, x, "k", (8, torch.float32))
    ask(cache, compute, x, "v", (8, torch.bfloat16))
    with torch.no_grad():
        assert not ask(cache, compute, x, "o", (8, torch.bfloat16)).requires_grad
    assert compute.calls == 4


def test_h_goes_with_x(compute):
    cache, x = LastInput(), torch.randn(3)
    ask(cache, compute, x, "q")
    gc.disable()
    try:
        del x
        assert cache._h is None and cache._source is None
    finally:
        gc.enable()


def test_in_inference_mode_it_shares_as_well(compute):
    cache = LastInput()
    with torch.inference_mode():
        x = torch.randn(3)
        assert ask(cache, compute, x, "q") is ask(cache, compute, x, "k")


def test_a_copy_starts_empty(compute):
    cache, x = LastInput(), torch.randn(3, requires_grad=True)
    ask(cache, compute, x, "q")
    assert copy.deepcopy(cache)._h is None
