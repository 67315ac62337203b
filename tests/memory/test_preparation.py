"""What prepare() needs while it runs: one matrix's working set, not a second model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qsvft
from qsvft.memory.held import held_tensors
from qsvft.memory.ledger import Ledger
from qsvft.memory.presets import model_config

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@dataclass(frozen=True)
class PreparationPeak:
    """Bytes before, at the highest point of, and after a preparation.

    Attributes:
        working_set: what preparing needed beyond the larger of the model before and the model after.
    """

    before: int
    peak: int
    after: int

    @property
    def working_set(self) -> int:
        return self.peak - max(self.before, self.after)


def count_preparation(model: nn.Module, **options: Any) -> PreparationPeak:
    """Prepare a model in place under the ledger.

    Args:
        model: a real model (not on the meta device).
        **options: as for :func:`qsvft.prepare`.
    """
    ledger = Ledger()
    for tensor, category in held_tensors(model):
        ledger.register(tensor, category)
    before = ledger.live_bytes()
    with ledger:
        prepared = qsvft.prepare(model, progress=False, **options)
    after = ledger.live_bytes()
    del prepared
    return PreparationPeak(before, ledger.high_water(), after)


def prepared(layers: int, **options: object) -> PreparationPeak:
    config = model_config("tiny")
    config.num_hidden_layers = layers
    return count_preparation(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), **options)


@pytest.mark.parametrize("sides", ["one", "both"])
def test_the_working_set_does_not_grow_with_the_number_of_layers(sides: str) -> None:
    assert prepared(6, sides=sides).working_set == prepared(2, sides=sides).working_set


def test_quantising_never_holds_two_models() -> None:
    """Beyond the bf16 model there is at any time the 4-bit copy of what is done and one matrix at work."""
    found = prepared(16, rank=9)
    assert found.peak < 1.4 * found.before


def test_the_base_shrinks_to_a_quarter_and_the_factors_come_on_top() -> None:
    plain, full = prepared(8, rank=9).after, prepared(8).after
    assert plain < prepared(8).before
    assert full > plain
