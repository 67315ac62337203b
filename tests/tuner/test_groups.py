"""One V for layers that read the same input: what is grouped, held once, computed once, and still exact."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, same_tensors, save_llama, tokens
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import qsvft
from qsvft import QSVFTConfig
from qsvft.storage.factors import StoredBasis
from qsvft.tuner import QSVFTLinear
from qsvft.tuner.groups import input_groups
from qsvft.tuner.targets import shape_of

BANDED = {"pattern": "banded", "off_diagonals": 4}
OPTIONS = [
    {"share_inputs": True},
    {"share_inputs": True, "factor_bits": 8},
    {"share_inputs": True, "factor_bits": 4, "rank": 40},
    {"share_inputs": True, "basis": "hadamard"},
    {"share_inputs": [["q_proj", "k_proj"]], "pattern": "random"},
    {"share_inputs": True, "pattern": "dense"},
]


def layers(model: nn.Module) -> dict[str, QSVFTLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QSVFTLinear)}


def grouped(model: nn.Module, share=True) -> list[tuple[str, ...]]:
    shapes = {n: shape_of(m, n) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    groups = input_groups(model, shapes, QSVFTConfig(share_inputs=share)).values()
    return sorted({group.members for group in groups})


def with_M(llama, **options) -> PeftModel:
    return randomize(qsvft.prepare(load(llama, torch.float32), bits=4, **{**BANDED, **options}), scale=0.3)


def test_llama_shares_q_k_v_and_gate_up(llama):
    parts = [[name.split(".")[-1] for name in members] for members in grouped(load(llama))]
    assert parts == 2 * [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]] or sorted(parts) == sorted(
        2 * [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]]
    )


def test_in_cross_attention_the_query_stands_alone():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, feed_forward_proj="gated-gelu", **sizes))
    for members in grouped(model):
        leaves = [name.split(".")[-1] for name in members]
        if leaves[0].startswith("wi"):
            assert leaves == ["wi_0", "wi_1"]
        else:
            assert leaves == (["k", "v"] if "EncDecAttention" in members[0] else ["q", "k", "v"])
    assert sum("EncDecAttention" in members[0] for members in grouped(model)) == 1


def test_bert_shares_query_key_value():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=32, **sizes))
    assert [[n.split(".")[-1] for n in members] for members in grouped(model)] == [["query", "key", "value"]]


def test_only_what_is_asked_for_and_targeted_is_shared(llama):
    model = load(llama)
    assert {len(members) for members in grouped(model, [["q_proj", "v_proj"]])} == {2}
    prepared = qsvft.prepare(model, bits=4, share_inputs=True, target_modules=["q_proj", "v_proj", "up_proj"])
    keys = {tuple(layer.qsvft_bases) for layer in layers(prepared).values()}
    assert keys == {("V_bf16_of_q_proj_v_proj",), ("V_bf16",)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_group_holds_one_basis_and_each_layer_its_own_scale_and_M(llama, options):
    model = with_M(llama, **options)
    first = {n.split(".")[-1]: layer for n, layer in layers(model).items() if "layers.0" in n}
    wanted = [["q_proj", "k_proj"]] if options["share_inputs"] is not True else None
    for members in wanted or [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]:
        bases = {id(next(iter(first[name].qsvft_bases.values()))) for name in members}
        assert len(bases) == 1
        scales = [first[name].qsvft_scale["default"] for name in members]
        assert not any(torch.equal(scales[0], other) for other in scales[1:])
    assert len({id(layer.qsvft_M["default"]) for layer in first.values()}) == 7


def test_llama_has_four_factors_a_layer_in_place_of_seven(llama):
    shared, alone = with_M(llama, share_inputs=True), with_M(llama, sides="one")
    assert len({id(m) for m in alone.modules() if isinstance(m, StoredBasis)}) == 14
    assert len({id(m) for m in shared.modules() if isinstance(m, StoredBasis)}) == 8


def test_the_bytes_of_a_shared_factor_count_once(tmp_path):
    """q, k, v, gate, up are 64 wide: of seven 64 x 64 factors four are left, and k, v have no 32 x 32 of their own."""
    folder = save_llama(tmp_path, num_key_value_heads=4)
    shared, alone = (
        qsvft.held_bytes(with_M(folder, sides="one", share_inputs=share))["factors"] for share in (True, False)
    )
    layer = 2 * 64 * 64
    assert alone - shared == 2 * 3 * layer


def test_by_default_nothing_is_shared_and_each_layer_holds_both_factors(llama):
    model = qsvft.prepare(load(llama), bits=4)
    assert {tuple(layer.qsvft_bases) for layer in layers(model).values()} == {("V_bf16", "U_bf16")}
    assert len({id(m) for m in model.modules() if isinstance(m, StoredBasis)}) == 28


@pytest.mark.parametrize("checkpointing", [True, False])
def test_coefficients_of_one_input_are_computed_once(llama, monkeypatch, checkpointing):
    calls: list[int] = []
    original = StoredBasis.to_coefficients

    def counting(self, a, rank):
        calls.append(id(self))
        return original(self, a, rank)

    monkeypatch.setattr(StoredBasis, "to_coefficients", counting)
    model = with_M(llama, share_inputs=True, gradient_checkpointing=checkpointing).train()
    calls.clear()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    assert len(calls) == 8
    loss.backward()
    assert len(calls) == (16 if checkpointing else 8)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_every_layer_computing_for_itself(llama, monkeypatch, options, checkpointing):
    def gradients():
        model = with_M(llama, gradient_checkpointing=checkpointing, **options).train()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    shared = gradients()
    monkeypatch.setattr("qsvft.tuner.layer.QSVFTLinear._shared_coefficients", lambda *_: None)
    for name, gradient in gradients().items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-6)


def test_layers_that_do_not_read_the_same_input_compute_for_themselves(llama):
    """Sharing V needs no shared input: the maps are right for whatever each layer reads."""
    model = with_M(llama, share_inputs=True)
    q, k = (layers(model)[f"base_model.model.model.layers.0.self_attn.{n}_proj"] for n in "qk")
    x, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    together = q(x), k(other)
    for found, layer, a in zip(together, (q, k), (x, other), strict=True):
        exact = a @ (layer.original_weight() + layer.get_delta_weight("default")).T
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adapter_merged_and_reloaded_models_agree(llama, tmp_path, options):
    model = with_M(llama, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qsvft.quantize(load(llama, torch.float32), 4), tmp_path)
    assert torch.equal(logits(again), expected)
    assert same_tensors(coefficients(again), coefficients(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_M_at_zero_it_is_the_base_bit_for_bit(llama, options):
    base = logits(qsvft.quantize(load(llama), 4))
    model = qsvft.prepare(load(llama), bits=4, **{**BANDED, **options})
    assert torch.equal(logits(model), base)
    randomize(model)
    assert not torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_a_second_adapter_of_a_larger_rank_extends_the_shared_basis_for_all(llama):
    model = with_M(llama, share_inputs=True, rank=20)
    before = logits(model)
    model.add_adapter("larger", QSVFTConfig(**BANDED, share_inputs=True, rank=48, task_type="CAUSAL_LM"))
    q, v = (layers(model)[f"base_model.model.model.layers.0.self_attn.{n}_proj"] for n in "qv")
    key = "V_bf16_of_q_proj_k_proj_v_proj"
    assert q.basis(key) is v.basis(key) and q.basis(key).rank == 48
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("alone", [{**BANDED, "sides": "one"}, {}], ids=["one-sided", "default"])
def test_sharing_and_not_sharing_adapters_stand_side_by_side(llama, alone):
    model = with_M(llama, share_inputs=True)
    expected = logits(model)
    model.add_adapter("alone", QSVFTConfig(**alone, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), expected)
    model.set_adapter("alone")
    randomize(model, "alone")
    by_itself = logits(model)
    model.base_model.set_adapter(["default", "alone"])
    both = logits(model)
    assert not torch.equal(both, by_itself) and not torch.equal(both, expected)
    torch.testing.assert_close(
        logits(model.merge_and_unload(adapter_names=["default", "alone"])), both, rtol=1e-2, atol=1e-2
    )


def test_a_copied_model_shares_among_its_own_layers(llama):
    model = with_M(llama, share_inputs=True)
    expected = logits(model)
    other = copy.deepcopy(model)
    names = ("q_proj", "k_proj")
    bases = [
        next(iter(layers(m)[f"base_model.model.model.layers.0.self_attn.{n}"].qsvft_bases.values()))
        for m in (model, other)
        for n in names
    ]
    assert bases[0] is bases[1] and bases[2] is bases[3] and bases[0] is not bases[2]
    assert torch.equal(logits(other), expected)


def test_a_rank_beyond_the_stacked_weight_is_refused_by_name(llama):
    message = r"k_proj: rank=80 in rank_pattern is over the limit; its weight is 32 x 64 \(the stacked weight .*has 64"
    with pytest.raises(ValueError, match=message):
        qsvft.prepare(load(llama), bits=4, share_inputs=True, rank_pattern={"k_proj": 80})
