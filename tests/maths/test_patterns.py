"""The patterns: how many entries, which ones, and that they can be found again."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsvft.maths.patterns import (
    DensePattern,
    IndexPattern,
    Pattern,
    banded,
    banded_count,
    plain,
    random_entries,
    top_entries,
)
from qsvft.options.choices import PATTERNS

ranks_and_bands = st.integers(1, 40).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k - 1)))


def entries(pattern: Pattern) -> list[tuple[int, int]]:
    rows, columns = pattern.indices()
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def orthonormal(rank: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator))[0].T


def make(name: str, rank: int, d: int) -> Pattern:
    if name == "plain":
        return plain(rank)
    if name == "banded":
        return banded(rank, d)
    if name == "dense":
        return DensePattern(rank)
    if name == "random":
        return random_entries(rank, d, "0:layer")
    return top_entries(orthonormal(rank, rank + 3, 1), orthonormal(rank, rank + 3, 2), d)


ALL = pytest.mark.parametrize("name", PATTERNS)


@settings(max_examples=40, deadline=None)
@given(ranks_and_bands)
def test_band_holds_exactly_the_entries_within_d_of_the_diagonal(case):
    rank, d = case
    expected = [(i, j) for i, j in itertools.product(range(rank), repeat=2) if abs(i - j) <= d]
    assert entries(banded(rank, d)) == expected


@settings(max_examples=40, deadline=None)
@given(ranks_and_bands, st.sampled_from(["banded", "random", "top_k"]))
def test_every_pattern_that_goes_by_d_has_as_many_entries_as_the_band(case, name):
    rank, d = case
    pattern = make(name, rank, d)
    assert pattern.count == rank * (2 * d + 1) - d * (d + 1) == banded_count(rank, d)
    assert len(entries(pattern)) == pattern.count


def test_dense_is_the_widest_band():
    assert entries(DensePattern(7)) == entries(banded(7, 6))
    assert DensePattern(7).count == 49 == banded_count(7, 6)


def test_plain_is_the_diagonal():
    assert entries(plain(7)) == [(i, i) for i in range(7)]
    assert plain(7).count == 7


@ALL
def test_entries_are_distinct_row_major_and_inside_the_matrix(name):
    pattern = make(name, 23, 4)
    found = entries(pattern)
    assert found == sorted(set(found))
    assert all(0 <= i < 23 and 0 <= j < 23 for i, j in found)


@ALL
def test_dense_puts_the_values_at_the_entries_in_their_order_and_zeros_elsewhere(name):
    pattern = make(name, 12, 3)
    values = torch.arange(1.0, pattern.count + 1)
    matrix = pattern.dense(values)
    rows, columns = pattern.indices()
    assert torch.equal(matrix[rows, columns], values)
    assert int((matrix != 0).sum()) == pattern.count


@ALL
def test_a_pattern_holds_nothing_that_trains_and_nothing_that_is_saved(name):
    pattern = make(name, 12, 3)
    assert list(pattern.parameters()) == []
    assert pattern.state_dict() == {}


def test_random_entries_come_back_from_the_same_seed():
    assert entries(random_entries(50, 5, "3:q_proj")) == entries(random_entries(50, 5, "3:q_proj"))


def test_random_entries_neither_use_nor_move_the_global_generators():
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    first = random_entries(50, 5, "seed")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(2)
    torch.manual_seed(2)
    assert entries(random_entries(50, 5, "seed")) == entries(first)


def test_random_entries_differ_between_seeds_and_between_layers():
    drawn = {random_entries(50, 5, seed).digest() for seed in ("0:q_proj", "1:q_proj", "0:k_proj")}
    assert len(drawn) == 3


def test_random_entries_reach_all_of_the_matrix():
    """With 20 draws of a tenth of the places no quarter of the matrix stays empty."""
    hits = sum(random_entries(40, 2, str(seed)).dense(torch.ones(banded_count(40, 2))) for seed in range(20))
    for rows, columns in itertools.product((slice(0, 20), slice(20, 40)), repeat=2):
        share = float(hits[rows, columns].sum() / hits.sum())
        assert 0.15 < share < 0.35


def test_random_entries_can_fill_the_whole_matrix():
    assert entries(random_entries(6, 5, "full")) == list(itertools.product(range(6), repeat=2))


@pytest.mark.parametrize(("m", "n"), [(20, 20), (31, 20), (20, 37)])
def test_top_k_takes_the_largest_products_of_u_and_v_over_their_common_coordinates(m, n):
    """Where the sizes differ, the shorter vector is continued with zeros."""
    rank, d = 15, 2
    U, V = orthonormal(rank, m, 3), orthonormal(rank, n, 4)
    scores = {}
    for i, j in itertools.product(range(rank), repeat=2):
        longest = max(m, n)
        u, v = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest, dtype=torch.float64)
        u[:m], v[:n] = U[i], V[j]
        scores[i, j] = abs(float(u @ v))
    best = sorted(scores, key=lambda entry: -scores[entry])[: banded_count(rank, d)]
    assert entries(top_entries(U, V, d)) == sorted(best)


def test_top_k_finds_the_diagonal_where_u_equals_v():
    U = orthonormal(9, 9, 5)
    assert entries(top_entries(U, U, 0)) == [(i, i) for i in range(9)]


def test_top_k_breaks_ties_the_same_way_every_time():
    U = torch.ones(8, 8)
    assert top_entries(U, U, 1).digest() == top_entries(U.clone(), U.clone(), 1).digest()


@ALL
def test_digest_is_the_same_for_the_same_entries(name):
    assert make(name, 12, 3).digest() == make(name, 12, 3).digest()


def test_digest_changes_with_one_entry_and_with_the_rank():
    flat = torch.tensor([0, 5, 7])
    digests = {
        IndexPattern(4, flat).digest(),
        IndexPattern(4, torch.tensor([0, 5, 8])).digest(),
        IndexPattern(4, torch.tensor([0, 5])).digest(),
        banded(4, 0).digest(),
        banded(5, 0).digest(),
        banded(5, 1).digest(),
    }
    assert len(digests) == 6


def test_digest_of_a_band_equals_that_of_the_same_entries_given_as_a_list():
    band = banded(10, 2)
    rows, columns = band.indices()
    assert IndexPattern(10, rows * 10 + columns).digest() == band.digest()


def test_list_of_entries_is_the_same_in_any_order():
    flat = torch.tensor([3, 0, 14, 9])
    assert IndexPattern(4, flat).digest() == IndexPattern(4, flat.flip(0)).digest()
    assert IndexPattern(4, flat).flat().tolist() == [0, 3, 9, 14]


@pytest.mark.parametrize("flat", [[-1, 3], [0, 16], [2**40]])
def test_entries_outside_the_matrix_are_refused(flat):
    with pytest.raises(ValueError, match=r"\[0, 16\) for rank 4"):
        IndexPattern(4, torch.tensor(flat))


def test_entries_that_repeat_are_refused():
    with pytest.raises(ValueError, match="must not repeat"):
        IndexPattern(4, torch.tensor([5, 1, 5]))


@ALL
def test_the_product_is_that_of_the_dense_matrix(name):
    pattern = make(name, 21, 3)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(9, 21, dtype=torch.float64, generator=generator)
    values = torch.randn(pattern.count, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(pattern.product(h, values), h @ pattern.dense(values).T)
