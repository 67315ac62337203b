"""Every family's step can be counted, on meta as on real tensors, whatever attention it has."""

import pytest
import torch
from needs import need
from torch.nn import functional
from transformers import AutoConfig

import qsvft
from qsvft.memory.attention import flash_attention
from qsvft.memory.methods import parse_method
from qsvft.memory.scenario import Scenario
from qsvft.storage import experts

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 128}
OTHER = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {**SMALL, "num_key_value_heads": 4, "intermediate_size": 128, "moe_intermediate_size": 32}
LATENT |= {"n_shared_experts": 1, "n_routed_experts": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 16, "qk_nope_head_dim": 16, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": GATED,
    "falcon": SMALL,
    "gptj": {**OTHER, "rotary_dim": 8, "n_positions": 64},
    "codegen": {**OTHER, "rotary_dim": 8, "n_positions": 64},
    "bloom": {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4},
    "stablelm": GATED,
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1},
    "mixtral": {**GATED, "num_local_experts": 4},
    "gpt_oss": {**GATED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# PEFT asks a deprecated property of transformers, and tells of its own patterns for experts.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]


@pytest.mark.parametrize("method", ["qsvft", "lora:8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_meta_and_real_tensors_give_the_same_bytes(family, method, monkeypatch):
    if (family, method) == ("deepseek_v3", "lora:8"):
        need("transformers", "5.13", "reads a router's bias through the wrapper that PEFT puts there")
    # Which expert a real row goes to is not known without values: rows are counted as spread evenly.
    monkeypatch.setattr(experts, "_counts", lambda number, count: experts.evenly(len(number), count))
    config = AutoConfig.for_model(family, **FAMILIES[family])
    places = (Scenario(config, parse_method(method), True, "adamw", device) for device in ("meta", "cpu"))
    predicted, counted = (place.count(2, 24)[0].peaks() for place in places)
    # Falcon takes its keys and values by lists, which are tensors of 8 bytes on real devices alone, two a layer.
    unseen = 4 * 512 if family == "falcon" else 0
    for name, peak in predicted.items():
        assert 0 <= counted[name].nbytes - peak.nbytes <= unseen, name
        assert unseen or peak.categories == counted[name].categories, name


@pytest.mark.parametrize("family", ["falcon", "gptj", "deepseek_v3"])
def test_a_card_is_chosen_for(family):
    found = qsvft.recommend(AutoConfig.for_model(family, **FAMILIES[family]), 8)
    assert found.fits and found.peak_bytes > 0


def heads(count, width, generator):
    return torch.randn(2, count, 6, width, generator=generator)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("keys", "width"), [(4, 16), (2, 16), (4, 8)])
def test_it_is_torchs_own_attention(keys, width, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = heads(4, 16, generator), heads(keys, 16, generator), heads(keys, width, generator)
    mask = torch.rand(2, 1, 6, 6, generator=generator) > 0.3 if masked else None
    if mask is not None:
        mask |= torch.eye(6, dtype=torch.bool)
    options = {"attn_mask": mask, "is_causal": not masked, "scale": 0.3}
    expected = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    with flash_attention():
        found = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    assert torch.allclose(found, expected, atol=1e-6)


def test_heads_that_do_not_divide_are_refused():
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 3, 2, 8)
    with flash_attention(), pytest.raises(ValueError, match=r"found 4 heads of queries and 3 of keys; expected"):
        functional.scaled_dot_product_attention(q, k, k)
