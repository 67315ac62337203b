"""The ledger counts experts as each method holds them."""

import pytest
from transformers import AutoConfig

import qsvft
from qsvft.memory.methods import parse_method
from qsvft.memory.scenario import Scenario

L, H, INNER, E = 2, 128, 256, 4
CONFIG = {"vocab_size": 96, "hidden_size": H, "intermediate_size": INNER, "num_hidden_layers": L}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": E}
NUMBERS = L * E * 3 * H * INNER
NF4 = NUMBERS // 2 + NUMBERS // 64 * (1 + 4 / 256)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]


def held(text, device="meta"):
    """Bytes of all weights that do not train, at the peak of a step."""
    config = AutoConfig.for_model("mixtral", **CONFIG)
    peak = Scenario(config, parse_method(text), True, "adamw", device).count(1, 16)[0].peaks()["total"]
    return sum(peak.categories[name] for name in ("base weights", "other weights"))


def test_experts_are_in_4_bits_where_this_package_holds_them_and_dense_where_bitsandbytes_does():
    dense = held("qlora:8")
    assert dense > 2 * NUMBERS
    for method in ("floor", "qsvft:rank=8"):
        assert dense - held(method) == pytest.approx(2 * NUMBERS - NF4, rel=0.05)


def test_experts_that_are_adapted_are_counted():
    config = AutoConfig.for_model("mixtral", **CONFIG)
    sizes = {"seq_len": 16, "rank": 8, "gradient_checkpointing": True}
    plain = qsvft.recommend(config, 24, **sizes)
    named = qsvft.recommend(config, 24, **sizes, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    factors = L * E * 8 * ((2 * INNER + H) + (H + INNER))  # int8
    M = L * E * 2 * 8 * 8 * 4 * 3  # with AdamW
    assert named.peak_bytes - plain.peak_bytes > factors + M
