"""The best fit of a smaller rank to a product, found in its small core, against the SVD of the whole in fp64."""

import pytest
import torch

from qsvft.maths import low_rank
from qsvft.maths.low_rank import distance, spectrum


def factors(m, k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, k), (k, n)))
    return B * torch.logspace(0, -3, k, dtype=torch.float64), A


@pytest.mark.parametrize(("m", "k", "n"), [(40, 12, 30), (30, 12, 50), (20, 20, 20), (9, 12, 30), (30, 12, 7)])
def test_it_is_the_svd_of_the_product(m, k, n):
    B, A = factors(m, k, n)
    U, s, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    found = spectrum(B, A)
    count = min(len(found.s), len(s))
    assert torch.allclose(found.s[:count], s[:count], rtol=1e-10, atol=1e-10)
    assert found.norm == pytest.approx(float((B @ A).norm()), rel=1e-12)
    for rank in (1, 3, count):
        best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        assert torch.allclose(found.left[:, :rank] @ found.right[:rank], best, atol=1e-9)
        assert found.error(rank) == pytest.approx(float((B @ A - best).norm()), abs=1e-5)


def test_of_a_large_core_the_leading_directions_are_found(monkeypatch):
    monkeypatch.setattr(low_rank, "_CORE", 10)
    monkeypatch.setattr(low_rank, "_MOST", 24)
    B, A = factors(60, 40, 50)
    before = torch.random.get_rng_state()
    found, again = spectrum(B, A), spectrum(B, A)
    assert torch.equal(torch.random.get_rng_state(), before) and torch.equal(found.s, again.s)
    s = torch.linalg.svdvals(B @ A)
    assert len(found.s) == 24 and torch.allclose(found.s[:12], s[:12], rtol=1e-3)
    left = float((B @ A - found.left[:, :8] @ found.right[:8]).norm())
    assert found.error(8) == pytest.approx(left, rel=1e-2)


def test_the_distance_of_two_products():
    (B, A), (other_B, other_A) = factors(30, 8, 20), factors(30, 5, 20, seed=1)
    assert distance(B, A, other_B, other_A) == pytest.approx(float((B @ A - other_B @ other_A).norm()), rel=1e-10)
    assert distance(B, A, B, A) < 1e-6 * float((B @ A).norm())
