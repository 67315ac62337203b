"""Which decomposition a layer's bases come from: the keys tell them apart, and an adapter finds its own again."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, same_tensors
from torch import nn

import qsvft
from qsvft import QSVFTConfig
from qsvft.maths import subspace
from qsvft.maths.decomposition import EXACT, Decomposer, decompose
from qsvft.tuner import QSVFTLinear
from qsvft.tuner.form import form_of

RANDOMIZED, FLOAT32 = Decomposer(randomized=True), Decomposer(dtype=torch.float32)
BOTH = Decomposer(randomized=True, dtype=torch.float32)
BANDED = {"pattern": "banded", "off_diagonals": 4}
ONE_SIDED = {**BANDED, "sides": "one"}


@pytest.fixture
def narrow(monkeypatch):
    """A space so small that randomized directions of small weights are not their singular vectors."""
    monkeypatch.setattr(subspace, "BLOCKS", 2)
    monkeypatch.setattr(subspace, "LEAST_BLOCK", 4)


def adapted(size: int, **options) -> QSVFTLinear:
    torch.manual_seed(0)
    return QSVFTLinear(nn.Linear(size, size), "default", QSVFTConfig(**{**ONE_SIDED, **options}), "layer")


def held(layer: QSVFTLinear, key: str) -> torch.Tensor:
    return layer.basis(key).dense(torch.bfloat16)


def expected(layer: QSVFTLinear, rank: int, method: Decomposer) -> torch.Tensor:
    V = decompose(layer.original_weight(), rank, "one", method).V
    assert V is not None
    return V.bfloat16()


@pytest.mark.parametrize(
    ("decomposition", "rank", "part", "method"),
    [
        (None, 64, "_randomized_64", RANDOMIZED),
        ("auto", 128, "_randomized_128", RANDOMIZED),
        ("auto", 129, "", EXACT),
        ("exact", 64, "", EXACT),
        ("randomized", 1024, "_randomized_1024", RANDOMIZED),
        ("float32", 64, "_float32_64", BOTH),
        ("float32", 1024, "_float32", FLOAT32),
    ],
)
def test_a_key_says_how_the_vectors_were_computed(decomposition, rank, part, method):
    def form(shape, **options):
        return form_of(QSVFTConfig(**{"decomposition": decomposition, "factor_bits": 16, **options}), shape, rank)

    tall, wide = form((2048, 1024), sides="one"), form((1024, 2048), sides="one", factor_bits=4)
    both, residual = form((2048, 1024)), form((1024, 1024), residual=True)
    assert tall.keys == (f"V_bf16{part}",)
    assert wide.keys == (f"U_nf4{part}",)
    assert both.keys == (f"V_bf16{part}", f"U_bf16{part}")
    assert residual.keys == (f"V_bf16{part}_original", f"U_bf16{part}_original")
    assert {f.method for f in (tall, wide, both, residual)} == {method}


def test_a_large_weight_with_a_small_rank_gets_randomized_directions_by_itself():
    layer = adapted(1024, rank=16)
    assert list(layer.qsvft_bases) == ["V_bf16_randomized_16"]
    assert torch.equal(held(layer, "V_bf16_randomized_16"), expected(layer, 16, RANDOMIZED))


def test_the_default_rank_of_a_dense_M_is_small_enough_for_randomized_directions():
    layer = QSVFTLinear(nn.Linear(1024, 1024), "default", QSVFTConfig(factor_bits=16), "layer")
    assert list(layer.qsvft_bases) == ["V_bf16_randomized_128", "U_bf16_randomized_128"]
    parts = decompose(layer.original_weight(), 128, "both", RANDOMIZED)
    for side, rows in (("V", parts.V), ("U", parts.U)):
        assert torch.equal(held(layer, f"{side}_bf16_randomized_128"), rows.bfloat16())


@pytest.mark.parametrize("sides", ["one", "both"])
def test_each_decomposition_is_computed_as_asked_and_all_stand_side_by_side(narrow, sides):
    layer = adapted(64, rank=12, decomposition="exact", sides=sides)
    for name in ("randomized", "float32"):
        layer.update_layer(name, QSVFTConfig(**{**BANDED, "sides": sides}, rank=12, decomposition=name))
    for key, method in (("bf16", EXACT), ("bf16_randomized_12", RANDOMIZED), ("bf16_float32", FLOAT32)):
        parts = decompose(layer.original_weight(), 12, sides, method)
        assert torch.equal(held(layer, f"V_{key}"), parts.V.bfloat16())
        assert sides == "one" or torch.equal(held(layer, f"U_{key}"), parts.U.bfloat16())
    assert len(layer.qsvft_bases) == (3 if sides == "one" else 6)
    assert not torch.equal(held(layer, "V_bf16"), held(layer, "V_bf16_randomized_12"))


def test_a_larger_rank_never_extends_randomized_directions(narrow):
    layer = adapted(64, rank=12, decomposition="randomized")
    before = held(layer, "V_bf16_randomized_12").clone()
    layer.update_layer("larger", QSVFTConfig(**ONE_SIDED, rank=20, decomposition="randomized"))
    assert torch.equal(held(layer, "V_bf16_randomized_12"), before)
    assert torch.equal(held(layer, "V_bf16_randomized_20"), expected(layer, 20, RANDOMIZED))
    assert not torch.equal(held(layer, "V_bf16_randomized_20")[:12], before)


@pytest.mark.parametrize(
    "options",
    [ONE_SIDED, {**BANDED, "sides": "both"}, {**ONE_SIDED, "factor_bits": 4}, {}],
    ids=["one-sided", "two-sided", "one-sided in NF4", "default"],
)
@pytest.mark.parametrize("decomposition", ["exact", "randomized", "float32"])
def test_an_adapter_comes_back_on_the_bases_it_was_trained_on(narrow, llama, tmp_path, decomposition, options):
    options = {"rank": 12, "decomposition": decomposition, **options}
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, **options), scale=0.3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qsvft.quantize(load(llama, torch.float32), 4), tmp_path)
    assert torch.equal(logits(again), logits(model)) and same_tensors(coefficients(again), coefficients(model))


def test_an_adapter_saved_before_there_was_a_choice_is_loaded_on_the_singular_vectors(tmp_path):
    """Where the library now chooses otherwise by itself."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1024, 1024, bias=False))

    options = {"target_modules": ["0"], "rank": 16, **ONE_SIDED}
    model = randomize(qsvft.prepare(base(), bits=16, decomposition="exact", **options))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["decomposition"]
    path.write_text(json.dumps(config))
    again = PeftModel.from_pretrained(base(), tmp_path)
    x = torch.randn(2, 1024)
    assert list(again.base_model.model[0].qsvft_bases) == ["V_bf16"]
    assert torch.equal(again(x), model(x))


def test_a_residual_base_is_not_taken_for_one_of_another_decomposition(narrow):
    options = {**BANDED, "sides": "both", "residual": True, "rank": 12}
    layer = adapted(64, decomposition="randomized", **options)
    layer.update_layer("same", QSVFTConfig(decomposition="randomized", **options))
    assert torch.equal(held(layer, "V_bf16_randomized_12_original"), layer.base_layer.basis("V").dense(torch.bfloat16))
    message = r"layer: its residual base was made with decomposition='randomized', the new adapter asks for 'exact'"
    with pytest.raises(ValueError, match=message):
        layer.update_layer("other", QSVFTConfig(decomposition="exact", **options))
