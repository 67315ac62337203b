"""The randomized directions: orthonormal, nearly the most energy, and a reproducible function of the weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsvft.maths import subspace
from qsvft.maths.decomposition import Decomposer, Decomposition, decompose, sign_reference
from qsvft.maths.patterns import banded
from qsvft.maths.subspace import leading_directions, start

RANDOMIZED = Decomposer(randomized=True)
SIZE, RANK = 512, 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small weights stand for large ones: 7 blocks of 64 columns would span nearly all of them."""
    monkeypatch.setattr(subspace, "LEAST_BLOCK", 16)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def power_law(exponent: float) -> Tensor:
    """A square weight with s_j = j^-exponent."""
    left, right = (torch.linalg.qr(noise(SIZE, SIZE, seed=seed))[0] for seed in (1, 2))
    return left * torch.arange(1, SIZE + 1, dtype=torch.float64) ** -exponent @ right


def language_model_like() -> Tensor:
    strengths = 8 / torch.arange(1, 33, dtype=torch.float64) ** 0.7
    return (noise(SIZE, SIZE) + noise(SIZE, 32, seed=1) * strengths @ noise(32, SIZE, seed=2)) / SIZE**0.5


WEIGHTS = {
    "flat": lambda: noise(SIZE, SIZE) / SIZE**0.5,
    "language model": language_model_like,
    "power -1/4": lambda: power_law(0.25),
    "power -1": lambda: power_law(1.0),
    "power -2": lambda: power_law(2.0),
}
EACH = pytest.mark.parametrize("kind", WEIGHTS)


def directions(W: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    parts = decompose(W, rank, "one", RANDOMIZED)
    assert parts.V is not None
    return parts.s, parts.V


def orthonormal(rows: Tensor) -> None:
    assert float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max()) < 1e-12


def test_the_start_is_integer_arithmetic_that_python_repeats():
    prime = 2**31 - 1
    found = start(50, 3, 4)
    for row in (1, 2, 50):
        for column in (4, 7):
            x = (row * 1_103_515_249 + column * 1_640_531_513) % prime
            for odd in (747_796_405, 1_442_695_041, 1_779_033_703):
                x = (x ^ (x >> 15)) * odd % prime
            assert float(found[row - 1, column - 4]) == x / prime - 0.5


def test_the_start_does_not_depend_on_how_many_columns_are_asked_for_at_once():
    whole = start(100, 0, 20)
    assert torch.equal(torch.cat([start(100, 0, 7), start(100, 7, 13)], 1), whole)


def test_what_is_kept_of_the_start_lies_on_the_cpu_whatever_the_device():
    """A model's sizes kept on a card would take bytes there that no ledger counts."""
    with torch.device("meta"):  # as with a default device that is not the CPU
        on_the_device = start(37, 5, 3, torch.device("meta"))
        kept = start(37, 5, 3, torch.device("cpu"))
    assert on_the_device.is_meta and on_the_device.shape == (37, 3)
    assert torch.equal(kept, start(37, 0, 8)[:, 5:])


@pytest.mark.parametrize(("size", "count"), [(4096, 256), (1024, 1024), (300, 16)])
def test_the_start_is_as_well_conditioned_as_independent_noise(size, count):
    """Singular values within the edges that independent uniform entries have, sqrt(size) -+ sqrt(count)."""
    omega = start(size, 0, count) * 12**0.5
    s = torch.linalg.svdvals(omega)
    assert float(s[0]) < 1.1 * (size**0.5 + count**0.5)
    assert size == count or float(s[-1]) > 0.9 * (size**0.5 - count**0.5)
    assert float(omega.abs().max()) <= 3**0.5 and abs(float(omega.mean())) < 5 / (size * count) ** 0.5


@EACH
def test_rows_are_orthonormal_and_s_is_the_length_of_W_v(kind):
    W = WEIGHTS[kind]()
    s, V = directions(W)
    orthonormal(V)
    assert bool((s.diff() <= 0).all())
    torch.testing.assert_close(s, torch.linalg.vector_norm(W @ V.T, dim=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("kind", "least"),
    [("flat", 0.92), ("language model", 0.98), ("power -1/4", 0.99), ("power -1", 0.99999), ("power -2", 0.99999)],
)
def test_they_hold_nearly_the_energy_that_as_many_directions_can(kind, least):
    W = WEIGHTS[kind]()
    best = torch.linalg.svdvals(W)[:RANK].square().sum()
    assert least < float(directions(W)[0].square().sum() / best) < 1 + 1e-12


@EACH
def test_singular_vectors_that_stand_apart_are_found_themselves(kind):
    """Outliers above the bulk: 3, 2.8, ... times its edge."""
    W, edge = WEIGHTS[kind](), float(torch.linalg.matrix_norm(WEIGHTS[kind](), 2))
    left, right = (torch.linalg.qr(noise(SIZE, 6, seed=seed))[0] for seed in (3, 4))
    W = W + left * edge * torch.arange(6, 3, -0.5, dtype=torch.float64) @ right.T
    exact = torch.linalg.svd(W)[2][:6]
    overlap = (directions(W)[1][:6] * exact).sum(1).abs()
    assert float((1 - overlap).max()) < 1e-9


@pytest.mark.parametrize(("m", "n"), [(40, 40), (61, 40), (40, 75), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("rank", [1, None])
def test_where_the_space_is_the_whole_they_are_the_singular_vectors(m, n, rank):
    W = noise(m, n)
    k = rank or min(m, n)
    found, exact = decompose(W, k, "both", RANDOMIZED), decompose(W, k, "both")
    for a, b in ((found.U, exact.U), (found.s, exact.s), (found.V, exact.V)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank_of_W", [0, 1, 20])
def test_rank_deficient_and_zero_weights_give_orthonormal_rows_and_all_of_the_energy(rank_of_W):
    W = noise(200, rank_of_W) @ noise(rank_of_W, 180, seed=1)
    s, V = directions(W)
    orthonormal(V)
    assert float((s.square().sum() - W.square().sum()).abs()) <= 1e-9 * float(W.square().sum())


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_the_size_of_the_weight_does_not_matter(size):
    W = noise(120, 100)
    torch.testing.assert_close(directions(W * size)[1], directions(W)[1], rtol=1e-8, atol=1e-8)


def test_a_wide_weight_has_them_on_the_side_of_its_outputs():
    W = noise(150, 200)
    upright, turned = decompose(W.T, 9, "both", RANDOMIZED), decompose(W, 9, "both", RANDOMIZED)
    torch.testing.assert_close(turned.U, upright.V)
    torch.testing.assert_close(turned.V, upright.U)


def test_signs_follow_the_rule():
    V = directions(noise(200, 150))[1]
    assert bool((V @ sign_reference(150) > 0).all())


def test_the_weight_is_read_a_few_times_whatever_the_rank():
    reads = []

    def product(block: Tensor) -> Tensor:
        reads.append(block.shape[1])
        return block * torch.arange(1, SIZE + 1, dtype=block.dtype).unsqueeze(1)

    for rank in (1, RANK, 64):
        reads.clear()
        leading_directions(product, SIZE, rank, torch.float64, torch.device("cpu"))
        assert len(reads) == subspace.BLOCKS and sum(reads) <= max(4 * rank, 7 * subspace.LEAST_BLOCK)


def with_threads(W: Tensor, count: int) -> Tensor:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return directions(W)[1]
    finally:
        torch.set_num_threads(before)


def another_order_of_summation(W: Tensor) -> Tensor:
    """The rows of W turned over: the same WᵀW, added up from its other end."""
    return directions(W.flip(0))[1]


def rounded_elsewhere(W: Tensor) -> Tensor:
    return directions(W * (1 + 1e-15 * noise(*W.shape, seed=5)))[1]


@EACH
@pytest.mark.parametrize("again", [lambda W: with_threads(W, 2), another_order_of_summation, rounded_elsewhere])
def test_computed_another_way_the_bf16_vectors_are_the_same_up_to_isolated_roundings(kind, again):
    W = WEIGHTS[kind]()
    one, other = (V.bfloat16() for V in (with_threads(W, 1), again(W)))
    assert float((one != other).double().mean()) < 1e-4
    pattern = banded(RANK, 8)
    M = pattern.dense(noise(pattern.count))
    first, second = (V.double().T @ M @ V.double() for V in (one, other))
    assert float(torch.linalg.matrix_norm(second - first) / torch.linalg.matrix_norm(first)) < 1e-4


def test_torchs_random_state_is_neither_read_nor_changed():
    W = noise(200, 150)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = directions(W)[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(directions(W)[1], first)


def test_both_sides_come_from_the_same_directions():
    W = noise(300, 200)
    both: Decomposition = decompose(W, 10, "both", RANDOMIZED)
    orthonormal(both.U)
    torch.testing.assert_close(both.V, directions(W, 10)[1])
    torch.testing.assert_close(both.U, (W @ both.V.T / both.s).T)
