"""What belongs together in an adapter is bound together: layers, modules trained whole, config, and its two files."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import coefficients, load, logits, randomize, same_tensors, state
from transformers import BartConfig, BartForConditionalGeneration

import qsvft
from qsvft.storage import whole_folders

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST, SECOND = (f"base_model.model.model.layers.{number}.self_attn.q_proj" for number in (0, 1))
FORMS = {
    "dense": {},
    "random": {"pattern": "random", "off_diagonals": 2},
    "top_k": {"pattern": "top_k", "off_diagonals": 2},
    "one-sided": {"sides": "one", "pattern": "banded", "off_diagonals": 2},
}


def trained(llama, folder, seed=1, **options):
    model = qsvft.prepare(load(llama), 4, modules_to_save=["norm"], progress=False, **options)
    randomize(model, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(seed)
    model.save_pretrained(folder)
    return model


def reloaded(llama, folder):
    return PeftModel.from_pretrained(qsvft.quantize(load(llama), 4, skip_modules=["norm"], progress=False), folder)


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def exchange(tensors):
    for key in [key for key in tensors if key.startswith(FIRST)]:
        other = key.replace(FIRST, SECOND)
        tensors[key], tensors[other] = tensors[other], tensors[key]


@pytest.mark.parametrize("form", FORMS)
def test_the_records_of_two_layers_cannot_be_exchanged(llama, tmp_path, form, monkeypatch):
    trained(llama, tmp_path, **FORMS[form])
    edit(tmp_path, exchange)
    monkeypatch.setattr("qsvft.tuner.adapter_file.TOLERANCE", float("inf"))  # as where the two weights are alike
    monkeypatch.setattr("qsvft.tuner.layer.TOLERANCE", float("inf"))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: .* do not match their digest"):
        reloaded(llama, tmp_path)


def test_layers_of_two_saves_do_not_make_one_adapter(llama, tmp_path):
    trained(llama, tmp_path / "one", seed=1)
    trained(llama, tmp_path / "two", seed=2)
    other = load_file(tmp_path / "two" / WEIGHTS)
    edit(tmp_path / "one", lambda tensors: tensors.update({key: other[key] for key in other if key.startswith(FIRST)}))
    with pytest.raises(ValueError, match=r"14 layers and .* do not match their common digest: some are of another"):
        reloaded(llama, tmp_path / "one")


ENCODER, DECODER = (f"base_model.model.model.{side}.layers.0.self_attn.q_proj" for side in ("encoder", "decoder"))


def bart():
    """Trains biases; its encoder and decoder have layers of the same numbers and names, here with the same weights."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "pad_token_id": 0}
    counts = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    model = BartForConditionalGeneration(BartConfig(**sizes, **counts, **heads, max_position_embeddings=32))
    model.model.decoder.layers[0].self_attn.load_state_dict(model.model.encoder.layers[0].self_attn.state_dict())
    return get_peft_model(model, qsvft.QSVFTConfig(target_modules=["q_proj"], rank=4, bias="qsvft_only"))


def trained_bart(folder, seed):
    model = randomize(bart(), seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("q_proj.base_layer.bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


@pytest.mark.parametrize("what", ["M", "bias"])
def test_layers_of_an_encoder_and_a_decoder_are_told_apart(tmp_path, what):
    for seed in (1, 2):
        trained_bart(tmp_path / str(seed), seed)
    other = load_file(tmp_path / "2" / WEIGHTS)

    def of_another_save(tensors):
        tensors.update({key: other[key] for key in keys_of(ENCODER)})

    def exchanged(tensors):
        for key in keys_of(ENCODER):
            other = key.replace(ENCODER, DECODER)
            tensors[key], tensors[other] = tensors[other], tensors[key]

    def keys_of(layer):
        return [key for key in other if key.startswith(layer) and key.endswith("bias") == (what == "bias")]

    assert len(keys_of(ENCODER)) == len(keys_of(DECODER)) > 0
    PeftModel.from_pretrained(bart().unload(), tmp_path / "1")
    whole = load_file(tmp_path / "1" / WEIGHTS)
    for change in (of_another_save, exchanged):
        edit(tmp_path / "1", change)
        with pytest.raises(ValueError, match="do not match their common digest"):
            PeftModel.from_pretrained(bart().unload(), tmp_path / "1")
        save_file(whole, tmp_path / "1" / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("way", ["of another save", "in another shape", "in another dtype"])
def test_modules_that_were_trained_whole_are_bound_to_the_layers(llama, tmp_path, way):
    trained(llama, tmp_path / "one", seed=1)
    trained(llama, tmp_path / "two", seed=2)
    key, other = "base_model.model.model.norm.weight", load_file(tmp_path / "two" / WEIGHTS)
    shape_of = {"of another save": other[key], "in another dtype": load_file(tmp_path / "one" / WEIGHTS)[key].float()}
    shape_of["in another shape"] = load_file(tmp_path / "one" / WEIGHTS)[key].view(8, 8).clone()
    edit(tmp_path / "one", lambda tensors: tensors.update({key: shape_of[way]}))
    with pytest.raises(ValueError, match="do not match their common digest"):
        reloaded(llama, tmp_path / "one")


def test_without_the_common_digest_it_is_refused(llama, tmp_path):
    trained(llama, tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("base_model.model.qsvft_whole"))
    with pytest.raises(ValueError, match="has no qsvft_whole, the digest of all of it"):
        reloaded(llama, tmp_path)


EDITS = [
    {"pattern": "banded"},
    {"off_diagonals": 3},
    {"seed": 7},
    {"unit": "one"},
    {"rank": 16},
    {"rank_pattern": {"q_proj": 16}},
    {"factor_bits": 4},
    {"factor_bits": 16},
    {"decomposition": "float32"},
    {"sides": "both"},
    {"residual": True},
    {"basis": "data"},
    {"target_modules": ["q_proj"]},
    {"modules_to_save": None},
    {"bias": "all"},
]


@pytest.mark.parametrize("changed", EDITS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_an_edited_config_is_refused_or_the_same_map(llama, tmp_path, form, changed):
    model = trained(llama, tmp_path, **FORMS[form])
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    try:
        again = reloaded(llama, tmp_path)
    except (ValueError, TypeError, RuntimeError):
        return
    assert torch.equal(logits(again), logits(model))
    assert same_tensors(coefficients(again), coefficients(model))


class KilledError(BaseException):
    """In place of a signal."""


# Two renamings make the config, the third makes the new state count, three more put its files in their places.
@pytest.mark.parametrize("stop_at", range(6))
def test_killed_while_it_is_saved_over_another_it_is_one_of_the_two(llama, tmp_path, monkeypatch, stop_at):
    old = trained(llama, tmp_path, seed=1)
    new = trained(llama, tmp_path / "elsewhere", seed=2, pattern="banded", off_diagonals=2)
    count, replace = iter(range(100)), os.replace

    def dying(*args):
        if next(count) >= stop_at:
            raise KilledError
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(whole_folders.os, "replace", dying)
        patch.setattr(whole_folders.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KilledError):
            new.save_pretrained(tmp_path)
    again = reloaded(llama, tmp_path)
    assert torch.equal(logits(again), logits(new if stop_at >= 3 else old))
    assert again.peft_config["default"].pattern == ("banded" if stop_at >= 3 else "dense")


def test_an_adapter_of_another_name_is_one_state_too(llama, tmp_path, monkeypatch):
    model = qsvft.prepare(load(llama), 4, adapter_name="other", progress=False)
    randomize(model, "other").save_pretrained(tmp_path)
    expected = state(model)
    shutil.copytree(tmp_path / "other", tmp_path / "kept")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "qsvft_M" in name).add_(1)
    monkeypatch.setattr(whole_folders, "_publish", lambda folder: None)
    model.save_pretrained(tmp_path)
    monkeypatch.undo()
    base = qsvft.quantize(load(llama), 4, progress=False)
    again = PeftModel.from_pretrained(base, tmp_path / "other", adapter_name="other")
    assert torch.equal(logits(again), logits(model)) and not same_tensors(state(again), expected)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "kept", "other"]
