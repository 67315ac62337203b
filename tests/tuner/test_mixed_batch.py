"""Rows of one batch with adapters of their own: each is what it is alone."""

import pytest
import torch
from small_models import load, logits, randomize, tokens
from transformers import BartConfig, BartForConditionalGeneration

import qsvft
from qsvft import QSVFTConfig
from qsvft.tuner import QSVFTLinear

FORMS = {
    "default": ({}, {}),
    "one-sided": ({"sides": "one", "pattern": "banded", "off_diagonals": 2},) * 2,
    "both kinds": ({}, {"sides": "one", "pattern": "banded", "off_diagonals": 2}),
    "residual": ({"residual": True},) * 2,
}
NAMES = ["a", "__base__", "b", "a"]


def model_of(llama, form):
    first, second = FORMS[form]
    model = qsvft.prepare(load(llama, torch.float32), 4, adapter_name="a", **first)
    model.add_adapter("b", QSVFTConfig(task_type="CAUSAL_LM", **second))
    return randomize(randomize(model, "a", 0.3), "b", 0.3, seed=2).eval()


def alone(model, ids):
    """The logits of each of NAMES on its row, by adapters that act on the whole batch."""
    with model.disable_adapter():
        found = {"__base__": logits(model, ids)}
    for name in ("a", "b"):
        model.set_adapter(name)
        found[name] = logits(model, ids)
    return torch.stack([found[name][row] for row, name in enumerate(NAMES)])


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_each_row_has_its_own_adapter(llama, form):
    model, ids = model_of(llama, form), tokens(4, 12)
    expected = alone(model, ids)
    mixed = model(input_ids=ids, adapter_names=NAMES).logits
    assert torch.allclose(mixed, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    others = model(input_ids=ids, adapter_names=NAMES[::-1]).logits
    assert float((others - expected).abs().max()) > 0.2 * float(expected.abs().max())
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, QSVFTLinear))


@torch.no_grad()
def test_rows_of_a_layer_are_those_of_dense_weights_in_fp64(llama):
    model = model_of(llama, "both kinds")
    layer = next(module for module in model.modules() if isinstance(module, QSVFTLinear))
    x = torch.randn(4, 3, layer.in_features)
    found, W = layer(x, adapter_names=NAMES), layer.original_weight().double()
    for row, name in enumerate(NAMES):
        weight = W if name == "__base__" else W + layer.get_delta_weight(name).double()
        expected = x[row].double() @ weight.T
        assert float((found[row].double() - expected).norm()) <= 1e-5 * float(expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_takes_them_too(llama, beams):
    model, ids = model_of(llama, "default"), tokens(4, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
    found = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    expected = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = model.generate(input_ids=ids, **options)
    with model.disable_adapter():
        expected["__base__"] = model.generate(input_ids=ids, **options)
    assert torch.equal(found, torch.stack([expected[name][row] for row, name in enumerate(NAMES)]))


@torch.no_grad()
def test_beams_leave_the_rows_of_an_encoder_as_they_are():
    torch.manual_seed(0)
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, init_std=0.3, **sizes, **heads))
    model = qsvft.prepare(bart, 4, adapter_name="a")
    model.add_adapter("b", QSVFTConfig(task_type="SEQ_2_SEQ_LM"))
    randomize(randomize(model, "a"), "b", seed=2).eval()
    ids, options = tokens(2, 6) % 64, {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    found = model.generate(input_ids=ids, adapter_names=["a", "b"], **options)
    for row, name in enumerate(("a", "b")):
        model.set_adapter(name)
        assert torch.equal(model.generate(input_ids=ids, **options)[row], found[row])


REFUSED = {
    "unknown": (["a", "c", "b", "a"], ValueError, r"adapter\(s\): c\. Expected .* some of \['a', 'b'\]"),
    "too few": (["a"], ValueError, r"q_proj: .* number of inputs, but got 1 names and 4 rows\."),
    "a string": ("aaaa", TypeError, r"adapter_names=: found 'aaaa'; expected a list"),
}


@pytest.mark.parametrize(("names", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_names_that_mean_nothing_are_refused(llama, names, error, message):
    with pytest.raises(error, match=message):
        model_of(llama, "default")(input_ids=tokens(4, 12), adapter_names=names)


def test_in_training_when_merged_and_with_anothers_offsets_it_is_refused(llama):
    model, ids = model_of(llama, "default"), tokens(4, 12)
    with pytest.raises(ValueError, match=r"when the model is in training mode\. Call model\.eval\(\)"):
        model.train()(input_ids=ids, adapter_names=NAMES)
    with pytest.raises(ValueError, match="alora_offsets=: found offsets; expected none"):
        model.eval()(input_ids=ids, alora_offsets=[1, 2, 3, 4])
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match=r"q_proj: .* when there are merged adapters, .*unmerge.* Found a,"):
        model(input_ids=ids, adapter_names=NAMES)
