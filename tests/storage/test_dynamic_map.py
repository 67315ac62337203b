"""The map of double quantisation: bitsandbytes' numbers, and the same on every processor."""

import math

import bitsandbytes as bnb
import pytest
import torch

from qsvft.storage.dynamic_map import dynamic_map
from qsvft.storage.nf4 import nf4_parameter

pytestmark = pytest.mark.anywhere


def test_the_numbers_follow_their_formula_to_the_last_bits():
    exact = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        means = [10.0 ** (decade - 6) * (0.1 + 0.9 * (2 * j + 1) / (2 * count)) for j in range(count)]
        exact += [*means, *(-mean for mean in means)]
    found = dynamic_map()
    assert found.dtype == torch.float32 and found.shape == (256,)
    assert all(math.isclose(a, b, rel_tol=3e-7) for a, b in zip(found.tolist(), sorted(exact), strict=True))


def test_they_are_those_of_bitsandbytes():
    """Bit for bit where torch has fused multiply-adds, to the last bit elsewhere."""
    theirs = bnb.functional.create_dynamic_map()
    torch.testing.assert_close(dynamic_map(), theirs, rtol=2e-7, atol=0)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert torch.equal(dynamic_map(), theirs)


def test_a_quantised_weight_holds_them():
    state = nf4_parameter(torch.randn(64, 64)).quant_state
    assert torch.equal(state.state2.code, dynamic_map())
