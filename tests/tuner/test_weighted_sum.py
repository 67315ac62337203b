"""add_weighted_adapter: the sum of the changes, exactly, or a refusal."""

import pytest
import torch
from peft import PeftModel
from small_models import load, logits, randomize

import qsvft
from qsvft import QSVFTConfig
from qsvft.maths.updates import unit_of
from qsvft.tuner import QSVFTLinear

FORMS = {
    "default": {},
    "one-sided": {"sides": "one", "pattern": "banded", "off_diagonals": 2},
    "random": {"pattern": "random", "off_diagonals": 2},
    "top_k": {"pattern": "top_k", "off_diagonals": 2, "factor_bits": 4},
    "residual": {"residual": True, "rank": 8},
}


def two(llama, first, second, **more):
    model = qsvft.prepare(load(llama, torch.float32), 4, progress=False, **first, **more)
    model.add_adapter("b", QSVFTConfig(task_type="CAUSAL_LM", **second))
    return randomize(randomize(model, scale=0.3), "b", scale=0.3, seed=2)


def changes(model, adapter):
    layers = {m.module_name: m for m in model.modules() if isinstance(m, QSVFTLinear)}
    return {name: layer.get_delta_weight(adapter).double() for name, layer in layers.items()}


@pytest.mark.parametrize("form", FORMS)
def test_its_change_is_the_sum_of_the_changes(llama, tmp_path, monkeypatch, form):
    with monkeypatch.context() as before:  # one that was made when alpha was another
        before.setattr("qsvft.tuner.layer.unit_of", lambda *of: 3 * unit_of(*of))
        model = two(llama, FORMS[form], FORMS[form])
    model.add_adapter("c", QSVFTConfig(task_type="CAUSAL_LM", **FORMS[form]))
    randomize(model, "c", scale=0.3, seed=3)
    active = logits(model)
    model.add_weighted_adapter(["default", "b", "c"], [0.3, -1.7, 2.0], "mix")
    assert torch.equal(logits(model), active)
    one, two_, three, mix = (changes(model, name) for name in ("default", "b", "c", "mix"))
    for name, found in mix.items():
        expected = 0.3 * one[name] - 1.7 * two_[name] + 2.0 * three[name]
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    model.set_adapter("mix")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    base = load(llama, torch.float32) if form == "residual" else qsvft.quantize(load(llama, torch.float32), 4)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "mix")), expected)


OTHERS = {
    "another pattern": ({}, {"pattern": "banded"}),
    "another rank": ({}, {"rank": 16}),
    "other bits": ({}, {"factor_bits": 16}),
    "another seed": ({"pattern": "random"}, {"pattern": "random", "seed": 1}),
    "other layers": ({}, {"target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize(("first", "second"), OTHERS.values(), ids=OTHERS)
def test_adapters_that_are_other_maps_are_refused_by_the_layer(llama, first, second):
    model = two(llama, first, second)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\..*: the adapters \['default', 'b'\] are not the same map"
    ):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "mix")
    assert set(model.peft_config) == {"default", "b"}


REFUSED = {
    "none": (([], [], "mix"), "found 0 adapters"),
    "weights": ((["default"], [1.0, 2.0], "mix"), r"found 1 adapters and the weights \[1.0, 2.0\]"),
    "a weight": ((["default"], [float("nan")], "mix"), "a finite weight for each"),
    "a name": ((["default", "c"], [1.0, 1.0], "mix"), r"found \['c'\]; expected some of \['b', 'default'\]"),
    "a name that is taken": ((["default"], [1.0], "b"), "there is an adapter 'b' already"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_sum_is_refused(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        two(llama, {}, {}).add_weighted_adapter(*arguments)


def test_modules_trained_whole_are_not_added_up(llama):
    model = two(llama, {}, {}, modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"adapter 'default' has modules_to_save=\['norm'\], which cannot be added up"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "mix")
