"""What prepare() needs while it runs: one matrix's working set, not a second model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qsvft.memory.preparation import PreparationPeak, count_preparation
from qsvft.memory.presets import model_config

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


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
