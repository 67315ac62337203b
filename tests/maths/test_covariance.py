"""Leading directions from one pass over vectors, against the eigenvectors of the whole covariance."""

import pytest
import torch
from torch import Tensor

from qsvft.maths.covariance import OVERSAMPLING, CovarianceSketch


def vectors(count: int, size: int, decay: float, seed: int = 0) -> Tensor:
    """Gaussian vectors whose covariance has the eigenvalues j^-decay in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    scale = torch.arange(1, size + 1, dtype=torch.float64) ** (-decay / 2)
    return (torch.randn(count, size, dtype=torch.float64, generator=generator) * scale) @ turn


def sketched(x: Tensor, rank: int, parts: int = 1) -> CovarianceSketch:
    sketch = CovarianceSketch(x.shape[1], rank)
    for part in x.chunk(parts):
        sketch.add(part)
    return sketch


def held_energy(directions: Tensor, x: Tensor) -> float:
    return float((x @ directions.T).square().sum())


@pytest.mark.parametrize(("size", "rank"), [(40, 40), (40, 10), (33, 1)])
def test_where_the_sketch_is_as_wide_as_the_vectors_it_is_exact(size, rank):
    x = vectors(200, size, 1.0)
    assert rank + OVERSAMPLING >= size
    values, rows = sketched(x, rank).directions()
    exact, basis = torch.linalg.eigh(x.T @ x)
    torch.testing.assert_close(values, exact.flip(0)[:rank], rtol=1e-5, atol=1e-5 * float(exact[-1]))
    largest = (rows[0] @ basis[:, -1]).abs()
    torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("decay", "least"), [(0.5, 0.8), (1.0, 0.93), (2.0, 0.999)])
@pytest.mark.parametrize("rank", [8, 32])
def test_the_directions_hold_nearly_the_most_energy_that_so_many_can(decay, least, rank):
    x = vectors(3000, 300, decay)
    _, rows = sketched(x, rank).directions()
    best = torch.linalg.eigvalsh(x.T @ x).flip(0)[:rank].sum()
    assert least <= held_energy(rows, x) / float(best) <= 1 + 1e-9


@pytest.mark.parametrize(("size", "rank"), [(300, 20), (40, 20), (64, 64)])
def test_the_directions_are_orthonormal_and_their_values_descend(size, rank):
    values, rows = sketched(vectors(500, size, 1.0), rank).directions()
    assert rows.shape == (rank, size) and rows.dtype == torch.float64
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
    assert bool((values.diff() <= 0).all()) and bool((values >= 0).all())


def test_fewer_vectors_than_directions_still_give_orthonormal_ones():
    x = vectors(5, 300, 1.0)
    values, rows = sketched(x, 20).directions()
    torch.testing.assert_close(rows @ rows.T, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-9)
    assert held_energy(rows, x) == pytest.approx(float(x.square().sum()), rel=1e-5)
    assert float(values[5:].max()) < 1e-4 * float(values[0])


def test_batches_in_any_division_give_the_same_directions():
    x = vectors(600, 200, 1.0)
    (one, first), (other, second) = (sketched(x, 16, parts).directions() for parts in (1, 7))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.T @ first, second.T @ second, rtol=0, atol=1e-3)


def test_energy_and_count_are_those_of_all_vectors():
    x = vectors(600, 50, 1.0)
    sketch = sketched(x, 4, 3)
    assert sketch.count == 600
    assert sketch.energy == pytest.approx(float(x.square().sum()), rel=1e-6)


def test_no_vectors_and_zeros_give_orthonormal_directions_without_energy():
    for x in (torch.zeros(0, 100), torch.zeros(9, 100)):
        values, rows = sketched(x, 8).directions()
        assert bool(torch.isfinite(rows).all())
        torch.testing.assert_close(rows @ rows.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)
        assert float(values.abs().max()) == 0
