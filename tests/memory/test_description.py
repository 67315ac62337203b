"""describe() lists every tensor that a model holds, once, and points at fp32 that nothing needs."""

from __future__ import annotations

import gc
import json
import types
import weakref

import pytest
import torch
from small_models import load, randomize, save_llama, tokens
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import qsvft
from qsvft.memory import describe
from qsvft.memory import description as module
from qsvft.memory.held import KINDS, OUTSIDE, held, held_bytes, held_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
OPTIONS = {
    "4 bits": {"bits": 4},
    "8 bits": {"bits": 8},
    "16 bits": {"bits": 16},
    "one side": {"bits": 4, "sides": "one", "pattern": "banded"},
    "both sides": {"bits": 4, "sides": "both", "pattern": "banded"},
    "factors in 8 bits": {"bits": 4, "factor_bits": 8},
    "factors in 4 bits": {"bits": 4, "factor_bits": 4},
    "random pattern": {"bits": 4, "pattern": "random"},
    "residual": {"bits": 4, "sides": "both", "rank": 16, "residual": True},
    "vocabulary in 8 bits": {"bits": 4, "quantize_embeddings": 8},
    "vocabulary in 4 bits": {"bits": 4, "quantize_embeddings": 4},
}


def prepared(folder, **options):
    return randomize(qsvft.prepare(load(folder), progress=False, off_diagonals=2, **options)).train()


def step(model):
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    return model


def storage(tensor):
    return tensor.untyped_storage()._cdata


def reachable(model):
    """Bytes of every storage that Python's garbage collector reaches from a model, gradients included."""
    skipped = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CodeType)
    found, seen, waiting = {}, set(), [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, skipped):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[storage(value)] = value.untyped_storage().nbytes()
            waiting.append(value.grad)
        waiting.extend(gc.get_referents(value))
    return found


def row(description, kind, dtype):
    (found,) = [row for row in description.rows if (row.kind, row.dtype) == (kind, dtype)]
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_tensor_that_can_be_reached_stands_in_one_row(name, tied, tmp_path):
    model = step(prepared(save_llama(tmp_path, tie_word_embeddings=tied), **OPTIONS[name]))
    items = list(held(model))
    expected = reachable(model)
    assert {storage(item.tensor): item.nbytes for item in items} == expected
    assert len(items) == len(expected)
    description = describe(model)
    assert sum(row.tensors for row in description.rows) == len(expected)
    assert description.total_bytes == sum(expected.values()) == sum(row.nbytes for row in description.rows)
    assert len({(row.kind, row.dtype) for row in description.rows}) == len(description.rows)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_prepared_model_holds_no_fp32_that_nothing_needs(llama, name, monkeypatch):
    """At a threshold below an fp32 copy of any factor or weight of the small model."""
    monkeypatch.setattr(module, "FLAGGED_BYTES", 64)
    model = prepared(llama, **OPTIONS[name])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    assert [row.wide for row in describe(model).rows if row.wide] == []
    fp32 = {row.kind for row in describe(model).rows if row.dtype == "float32"}
    assert {"M", "gradients"} <= fp32
    assert fp32 <= {"M", "gradients", "scales", "quantisation state", "patterns and probes", "other buffers", OUTSIDE}


PLACES = {
    "a parameter": lambda layer, copy: setattr(layer, "upcast", nn.Parameter(copy, requires_grad=False)),
    "a buffer": lambda layer, copy: layer.register_buffer("upcast", copy),
    "an attribute": lambda layer, copy: setattr(layer, "upcast", copy),
    "a list": lambda layer, copy: setattr(layer, "upcast", [{"a": (1, copy)}]),
    "a module in a list": lambda layer, copy: setattr(layer, "upcast", [nn.ParameterList([copy])]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_hidden_fp32_copy_is_counted_and_pointed_at(llama, place):
    model = prepared(llama, bits=4)
    before = describe(model)
    assert not any(row.wide for row in before.rows)
    layer = model.get_base_model().model.layers[1].mlp
    PLACES[place](layer, torch.zeros(2**18 + 1))
    after = describe(model)
    assert after.total_bytes == before.total_bytes + 2**20 + 4
    ((name,),) = [row.wide for row in after.rows if row.wide]
    assert name.startswith("base_model.model.model.layers.1.mlp.upcast")
    assert f"where nothing needs it: {name}" in str(after)


def test_fp32_of_one_mebibyte_is_not_pointed_at():
    for rows, wide in ((512, ()), (513, ("weight",))):
        (found,) = describe(nn.Linear(512, rows, bias=False).requires_grad_(False)).rows
        assert found.wide == wide


def test_M_and_its_gradient_may_be_large():
    network = nn.Sequential(nn.Linear(576, 576, bias=False)).to(torch.bfloat16)
    model = qsvft.prepare(network, bits=4, rank=576, progress=False)
    model(torch.randn(2, 576).to(torch.bfloat16)).sum().backward()
    description = describe(model)
    for kind in ("M", "gradients"):
        assert row(description, kind, "float32").nbytes == 4 * 576**2 > module.FLAGGED_BYTES
    assert not any(row.wide for row in description.rows)


def test_another_gradient_in_fp32_is_pointed_at():
    model = nn.Linear(1024, 512)
    model(torch.zeros(1, 1024)).sum().backward()
    assert row(describe(model), "gradients", "float32").wide == ("weight.grad",)


FORMS = {
    "both": {"qsvft_bases.U_int8.stored.codes": "factors"},
    "one": {"qsvft_scale.default": "scales"},
}


@pytest.mark.parametrize("sides", FORMS)
def test_kinds_are_what_the_tensors_are(llama, sides):
    model = step(prepared(llama, bits=4, sides=sides))
    kinds = {item.name.removeprefix("base_model.model."): item.kind for item in held(model)}
    layer = "model.layers.0.self_attn.q_proj"
    expected = {
        "model.embed_tokens.weight": "embeddings and head",
        "lm_head.weight": "embeddings and head",
        "model.norm.weight": "norms and biases",
        f"{layer}.base_layer.weight": "base weights",
        f"{layer}.base_layer.weight.quant_state.absmax": "quantisation state",
        f"{layer}.base_layer.weight.quant_state.state2.absmax": "quantisation state",
        f"{layer}.qsvft_bases.V_int8.stored.codes": "factors",
        **{f"{layer}.{name}": kind for name, kind in FORMS[sides].items()},
        f"{layer}.qsvft_M.default.weight": "M",
        f"{layer}.qsvft_probe.default": "patterns and probes",
        f"{layer}._expected_probe.default": "outside the module tree",
        "model.rotary_emb.inv_freq": "other buffers",
    }
    assert {name: kinds.get(name) for name in expected} == expected
    assert set(kinds.values()) <= set(KINDS)
    gradients = [item for item in held(model) if item.kind == "gradients"]
    assert len(gradients) == 14 and all(item.name.endswith("qsvft_M.default.weight.grad") for item in gradients)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_vocabulary_counts_as_the_dense_one_does(llama, bits):
    dense, quantised = (describe(prepared(llama, bits=4, quantize_embeddings=b)) for b in (16, bits))
    assert row(dense, "embeddings and head", "bfloat16").tensors == 2
    whole = {r.dtype for r in quantised.rows if r.kind == "embeddings and head"}
    assert whole == ({"int8", "bfloat16"} if bits == 8 else {"uint8", "bfloat16"})
    others = [[r for r in d.rows if r.kind != "embeddings and head"] for d in (dense, quantised)]
    assert others[0] == others[1]
    model = prepared(llama, bits=4, quantize_embeddings=bits)
    categories = {id(tensor): category for tensor, category in held_tensors(model)}
    stored = model.get_base_model().lm_head.stored
    assert {categories[id(part)] for part in stored.buffers()} == {"other weights"}
    assert held_bytes(prepared(llama, bits=4))["base"] - held_bytes(model)["base"] > 0


def test_a_head_that_is_trained_whole_is_a_module_to_save(llama):
    base = AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.bfloat16, num_labels=3)
    description = describe(qsvft.prepare(base, bits=4, progress=False))
    assert row(description, "modules to save", "bfloat16").nbytes == 3 * 64 * 2
    assert not [row for row in description.rows if row.kind == "other trainable parameters"]


def test_a_base_layer_that_a_merge_set_aside_is_still_counted(llama):
    model = prepared(llama, bits=4)
    before = {storage(item.tensor) for item in held(model) if item.kind in ("base weights", "quantisation state")}
    model.merge_adapter()
    assert {storage(item.tensor) for item in held(model) if item.kind == OUTSIDE} >= before
    assert describe(model).total_bytes == sum(reachable(model).values())


def test_a_model_without_adapters_is_described_by_what_it_consists_of(llama):
    for base in (load(llama), load(llama).requires_grad_(False)):
        kinds = {row.kind for row in describe(base).rows}
        assert kinds == {"base weights", "embeddings and head", "norms and biases", "other buffers"}


def test_what_a_step_starts_with_is_all_but_the_gradients(llama):
    model = step(prepared(llama, bits=4))
    gradients = sum(row.nbytes for row in describe(model).rows if row.kind == "gradients")
    assert gradients > 0
    rest = describe(model).total_bytes - gradients
    assert sum(tensor.untyped_storage().nbytes() for tensor, _ in held_tensors(model)) == rest
    assert sum(held_bytes(model).values()) == rest


def test_describing_twice_gives_the_same_and_keeps_no_tensor_alive(llama):
    model = prepared(llama, bits=4)
    description = describe(model)
    assert describe(model) == description
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not [reference for reference in references if reference() is not None]


def test_the_table_and_the_dictionary_say_the_same(llama):
    description = describe(prepared(llama, bits=4))
    text = str(description)
    for one in description.rows:
        assert any(one.kind in line and one.dtype in line and f"{one.nbytes:,}" in line for line in text.splitlines())
    assert f"{description.total_bytes:,}" in text
    again = json.loads(json.dumps(description.to_dict()))
    assert again["total_bytes"] == description.total_bytes
    assert [(r["kind"], r["dtype"], r["nbytes"]) for r in again["rows"]] == [
        (r.kind, r.dtype, r.nbytes) for r in description.rows
    ]


def test_a_model_that_holds_nothing_is_described_as_such():
    description = describe(nn.Identity())
    assert description.total_bytes == 0 and description.rows == ()
    assert "total" in str(description)
