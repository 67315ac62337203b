"""peft.utils.hotswap: another adapter's M in the same tensors, or the old adapter as it was."""

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from small_models import coefficients, load, logits, randomize, same_tensors, tokens

import qsvft
from qsvft.maths.updates import unit_of

FORMS = {
    "default": {},
    "one-sided": {"sides": "one", "pattern": "banded", "off_diagonals": 2},
    "top_k": {"pattern": "top_k", "off_diagonals": 2},
}


def saved(llama, folder, seed, **options):
    """An adapter on disk, and its logits."""
    options = {"rank": 8, "progress": False, **options}
    model = randomize(qsvft.prepare(load(llama, torch.float32), 4, **options), seed=seed)
    model.save_pretrained(folder)
    return model, logits(model)


@pytest.mark.parametrize("form", FORMS)
def test_the_model_becomes_the_other_adapter_and_M_stays_the_same_tensors(llama, tmp_path, form):
    _, expected = saved(llama, tmp_path / "other", 2, **FORMS[form])
    model, before = saved(llama, tmp_path / "first", 1, **FORMS[form])
    places = {name: p.data_ptr() for name, p in model.named_parameters() if "qsvft_M" in name}
    ids, short = tokens(2, 5), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    texts = []
    for folder, wanted in (("other", expected), ("first", before)):
        hotswap_adapter(model, str(tmp_path / folder), adapter_name="default", torch_device="cpu")
        assert torch.equal(logits(model), wanted)
        texts.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **short))
    assert not torch.equal(*texts)
    assert places == {name: p.data_ptr() for name, p in model.named_parameters() if "qsvft_M" in name}


def test_a_compiled_model_is_not_compiled_again(llama, tmp_path):
    torch._dynamo.reset()
    only = {"target_modules": ["layers.0.mlp.up_proj"], "gradient_checkpointing": False, "chunked_loss": False}
    _, expected = saved(llama, tmp_path / "other", 2, **only)
    model = torch.compile(saved(llama, tmp_path / "first", 1, **only)[0].eval(), backend="eager")
    with torch.no_grad():
        first = model(input_ids=tokens()).logits
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
        with torch.compiler.set_stance("fail_on_recompile"):
            found = model(input_ids=tokens()).logits
    assert not torch.equal(found, first)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


OTHERS = {
    "rank": ({"rank": 4}, "Configs are incompatible: for rank, 8 != 4"),
    "a head": ({"modules_to_save": ["lm_head"]}, "for modules_to_save, None != "),
    "layers": ({"target_modules": ["q_proj"]}, "the adapter file has no qsvft_unit for this layer"),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_another_map_is_refused_and_the_adapter_is_as_it_was(llama, tmp_path, options, message):
    saved(llama, tmp_path / "other", 2, **options)
    model, before = saved(llama, tmp_path / "first", 1)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model), before)


def test_one_of_another_base_is_refused_and_the_adapter_is_as_it_was(llama, other_llama, tmp_path):
    saved(other_llama, tmp_path / "other", 2, unit="one")
    model, before = saved(llama, tmp_path / "first", 1, unit="one")
    M = coefficients(model)
    with pytest.raises(ValueError, match=r"q_proj: this adapter does not fit the base model: its probe differs"):
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
    assert same_tensors(coefficients(model), M) and torch.equal(logits(model), before)


def test_another_alpha_is_refused_and_the_adapter_is_as_it_was(llama, tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("qsvft.tuner.layer.unit_of", lambda *of: 3 * unit_of(*of))
        saved(llama, tmp_path / "other", 2)
    model, expected = saved(llama, tmp_path / "first", 1)
    with pytest.raises(ValueError, match=r"q_proj: the adapter's M is for other entries or another alpha"):
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model), expected)


def test_what_cannot_be_swapped_is_named(llama, tmp_path):
    model, _ = saved(llama, tmp_path / "first", 1)
    with pytest.raises(ValueError, match="the model has no adapter 'b' of QSVFT"):
        hotswap_adapter(model, str(tmp_path / "first"), adapter_name="b", torch_device="cpu")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot hot-swap adapter 'default' because it is currently merged"):
        hotswap_adapter(model, str(tmp_path / "first"), adapter_name="default", torch_device="cpu")
    whole, _ = saved(llama, tmp_path / "whole", 1, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"the adapter trains more than M \(modules_to_save=\['lm_head'\]"):
        hotswap_adapter(whole, str(tmp_path / "whole"), adapter_name="default", torch_device="cpu")
