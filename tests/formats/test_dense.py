"""A dense model is written a layer at a time, and is bit for bit what merging in memory saves."""

import gc
import json
import os
import shutil
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import load, logits, randomize, same_tensors, save_llama, tokens
from stored_models import gpt2
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import qsvft
from qsvft.cli.main import app
from qsvft.formats import dense
from qsvft.formats.base import Base
from qsvft.maths import decomposition
from qsvft.storage.whole_folders import SAVING

META = {"format": "pt"}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FORMS = {
    "dense": {"rank": 8},
    "one-sided": {"rank": 8, "sides": "one"},
    "banded, all directions": {"pattern": "banded", "off_diagonals": 2},
    "a part of the layers": {"rank": 8, "target_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path / "cache"))


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments), "--format", "dense"])


def tensors_in(folder):
    """All tensors of a model on disk."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def compare(folder, expected, place):
    """What was exported is what ``save_pretrained`` of a merged model writes."""
    expected.save_pretrained(place)
    assert same_tensors(tensors_in(folder), tensors_in(place))
    assert config_in(folder) == config_in(place)


@pytest.mark.anywhere
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_bit_for_bit_what_merging_in_memory_saves(llama, tmp_path, form, bits, monkeypatch):
    monkeypatch.setattr(dense, "SHARD_BYTES", 2**16)
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", bits, dtype="bfloat16", progress=False, **FORMS[form])
    model = randomize(qsvft.from_pretrained(base, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    found = qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", progress=False)
    compare(tmp_path / "dense", model.merge_and_unload(), tmp_path / "expected")
    assert (tmp_path / "dense" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert (tmp_path / "dense" / "generation_config.json").is_file()
    assert "quantization_config" not in config_in(tmp_path / "dense")
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in tensors_in(tmp_path / "dense").values())
    assert found.layers == (3 if form == "a part of the layers" else 14) and found.dtype == "bfloat16"


FAMILIES = {
    "tied": ("llama", "LlamaForCausalLM", {"intermediate_size": 96, "tie_word_embeddings": True}, {}),
    # a tensor for each expert and matrix
    "mixtral": ("mixtral", "MixtralForCausalLM", {"intermediate_size": 96, "num_local_experts": 4}, {}),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "intermediate_size": 96},
        {},
    ),
    # the parameters as they are, the other way round, with biases
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM", {"intermediate_size": 96, "num_local_experts": 4, "head_dim": 16}, {}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {"intermediate_size": 96}, {}),  # biases
    "gemma2": ("gemma2", "Gemma2ForCausalLM", {"intermediate_size": 96, "head_dim": 16}, {}),
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def family(name, folder):
    kind, model, settings, _ = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **settings})
    made = getattr(transformers, model)(config).bfloat16()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    made.save_pretrained(folder)
    return folder


@pytest.mark.anywhere
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_of_other_families_as_well_experts_among_them(name, bits, tmp_path):
    source = family(name, tmp_path / "source")
    options = {"target_parameters": EXPERTS} if "experts" in "".join(tensors_in(source)) else {}
    model = randomize(qsvft.from_pretrained(source, bits, rank=8, progress=False, **options))
    model.save_pretrained(tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", progress=False)
    compare(tmp_path / "dense", model.merge_and_unload(), tmp_path / "expected")
    assert tensors_in(tmp_path / "dense").keys() == tensors_in(source).keys()  # the checkpoint's own names
    assert (tmp_path / "dense" / "model.safetensors").is_file()


def test_of_a_conv1d_as_well(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    model = randomize(qsvft.from_pretrained(tmp_path / "source", rank=8, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", progress=False)
    compare(tmp_path / "dense", model.merge_and_unload(), tmp_path / "expected")


def test_where_layers_are_not_converted_each_by_itself_all_are_converted_together(llama, tmp_path, monkeypatch):
    """As a class might, whose checkpoints have one tensor for the query of all layers."""

    def joined(model, tensors):
        ours = [name for name in tensors if name.endswith("q_proj.weight")]
        together = {"queries": torch.cat([tensors[name] for name in ours])} if ours else {}
        return {name: tensor for name, tensor in tensors.items() if name not in ours} | together

    monkeypatch.setattr(dense, "as_in_checkpoints", joined)
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, progress=False)
    model = randomize(qsvft.from_pretrained(base, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", progress=False)
    assert same_tensors(tensors_in(tmp_path / "dense"), joined(None, model.merge_and_unload().state_dict()))


def test_one_layer_is_in_memory_at_a_time(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "SHARD_BYTES", 2**10)
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, progress=False)
    randomize(qsvft.from_pretrained(base, progress=False)).save_pretrained(tmp_path / "adapter")
    alive, most = weakref.WeakSet(), []
    plain = Base.layer

    def counted(self, name):
        gc.collect()
        most.append(len(alive))
        layer = plain(self, name)
        alive.add(layer)
        return layer

    monkeypatch.setattr(Base, "layer", counted)
    qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", progress=False)
    assert len(most) == 14 and max(most) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_its_error_is_that_of_rounding_w_plus_dw_once(llama, tmp_path, dtype):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, dtype="bfloat16", progress=False)
    model = randomize(qsvft.from_pretrained(base, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    said = []
    options = {"format": "dense", "dtype": dtype, "progress": False, "report": said.append}
    found = qsvft.export(tmp_path / "adapter", tmp_path / "dense", **options)
    assert said == [found] and found.dtype == dtype
    written = tensors_in(tmp_path / "dense")
    assert {str(one.dtype) for one in written.values()} == {f"torch.{dtype}"}
    assert config_in(tmp_path / "dense")["dtype"] == dtype
    off = change = weights = worst = 0.0
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "qsvft_M"):
            continue
        W, dW = layer.original_weight().double(), layer.get_delta_weight("default").double()
        here = float((written[f"{name}.weight"].double() - (W + dW)).norm())
        off, change, weights = off + here**2, change + float(dW.norm()) ** 2, weights + float((W + dW).norm()) ** 2
        worst = max(worst, here / float(dW.norm()))
    assert found.error == pytest.approx((off / change) ** 0.5, rel=1e-2, abs=1e-6)
    assert found.of_weights == pytest.approx((off / weights) ** 0.5, rel=1e-2, abs=1e-7)
    assert found.worst[1] == pytest.approx(worst, rel=1e-2, abs=1e-6)
    card = (tmp_path / "dense" / "README.md").read_text()
    assert f"{found.error:.2%} of the adapter's change" in card and found.worst[0] in card
    if dtype != "bfloat16":
        assert found.error < 2e-3


def test_numbers_beyond_half_precision_are_refused_by_name(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, progress=False)
    randomize(qsvft.from_pretrained(base, progress=False), scale=1e7).save_pretrained(tmp_path / "adapter")
    options = {"format": "dense", "dtype": "float16", "progress": False}
    with pytest.raises(ValueError, match=r"layers\.0\.\S+: W \+ dW holds numbers that float16 has not"):
        qsvft.export(tmp_path / "adapter", tmp_path / "dense", **options)
    assert list((tmp_path / "dense").iterdir()) == []


@pytest.mark.parametrize("residual", [False, True], ids=["calibrated", "residual base"])
def test_onto_the_weights_before_rounding_it_is_those_and_what_was_learned(llama, tmp_path, residual):
    if residual:
        model = qsvft.from_pretrained(llama, rank=16, residual=True, dtype="bfloat16", progress=False)
    else:
        batch = {"input_ids": tokens(), "labels": tokens()}
        model = qsvft.from_pretrained(llama, rank=8, calibration=[batch], dtype="bfloat16", progress=False)
    randomize(model).save_pretrained(tmp_path / "adapter")
    options = {"format": "dense", "onto": "original", "dtype": "float32", "progress": False}
    found = qsvft.export(tmp_path / "adapter", tmp_path / "dense", **options)
    written, source = tensors_in(tmp_path / "dense"), load(llama).state_dict()
    changes = {m.module_name: m.get_delta_weight("default") for m in model.modules() if hasattr(m, "qsvft_M")}
    held = {m.module_name: m.original_weight().float() for m in model.modules() if hasattr(m, "qsvft_M")}
    zeroed = randomize(model, scale=0.0)
    given_back = {m.module_name: m.get_delta_weight("default") for m in zeroed.modules() if hasattr(m, "qsvft_M")}
    moved = weights = 0.0
    for name, tensor in source.items():
        layer = name.removesuffix(".weight")
        learned = changes[layer] - given_back[layer] if layer in changes else 0.0
        assert torch.allclose(written[name], tensor.float() + learned, atol=1e-5 * float(tensor.abs().max()))
        if layer in changes:
            moved += float((tensor.float() + learned - held[layer] - changes[layer]).norm()) ** 2
            weights += float(tensor.float().norm()) ** 2
    assert found.moved == pytest.approx((moved / weights) ** 0.5, rel=1e-3)
    assert 1e-3 < found.moved < 0.2 and f"{found.moved:.2%} of the weights away" in str(found)
    lora = qsvft.export(tmp_path / "adapter", tmp_path / "lora", onto="original", progress=False)
    assert lora.moved == pytest.approx(found.moved, rel=1e-3)


def test_onto_the_original_of_a_mixture_its_experts_are_the_originals(tmp_path):
    source = family("gpt_oss", tmp_path / "source")
    options = {"target_parameters": EXPERTS[:1], "target_modules": ["q_proj"], "rank": 8, "progress": False}
    model = randomize(qsvft.from_pretrained(source, **options), scale=0.0)
    model.save_pretrained(tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", onto="original", progress=False)
    assert same_tensors(tensors_in(tmp_path / "dense"), tensors_in(source))


def test_the_original_of_a_prepared_directory_is_asked_for(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, progress=False)
    model = randomize(qsvft.from_pretrained(base, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    options = {"format": "dense", "onto": "original", "progress": False}
    with pytest.raises(ValueError, match=r"base: holds its weights in 4 bits; expected those before .*--base"):
        qsvft.export(tmp_path / "adapter", tmp_path / "dense", **options)
    assert list((tmp_path / "dense").iterdir()) == []
    qsvft.export(tmp_path / "adapter", tmp_path / "dense", base=llama, **options)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    before = logits(load(llama, torch.float32))
    assert (logits(merged) - before).norm() > 0.05 * before.norm()


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """A prepared directory, an adapter trained on it, and the logits of the two merged."""
    folder = tmp_path_factory.mktemp("trained")
    qsvft.prepare_checkpoint(llama, folder / "prepared", progress=False)
    model = randomize(qsvft.from_pretrained(folder / "prepared", progress=False))
    model.save_pretrained(folder / "adapter")
    return folder / "prepared", folder / "adapter", logits(model.merge_and_unload())


def test_the_command_says_how_far_off_it_is(trained, tmp_path):
    result = run(trained[1], tmp_path / "merged", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "dense model in bfloat16, of which 14 layers change" in said and "of the adapter's change" in said
    assert "most in model.layers." in said


def test_the_base_may_be_the_checkpoint(trained, llama, tmp_path):
    _, adapter, expected = trained
    assert run(adapter, tmp_path / "merged", "--base", llama).exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_factors_that_come_out_otherwise_need_those_that_were_trained_with(trained, llama, tmp_path, monkeypatch):
    prepared, adapter, expected = trained
    signs = decomposition._signs
    monkeypatch.setattr(decomposition, "_signs", lambda vectors: -signs(vectors) * signs(vectors.flip(0)))
    refused = run(adapter, tmp_path / "merged", "--base", llama)
    assert refused.exit_code == 2
    assert "--base DIR" in refused.output
    assert list((tmp_path / "merged").iterdir()) == []
    assert run(adapter, tmp_path / "merged", "--base", prepared).exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_a_self_contained_adapter_needs_nothing_else(llama, tmp_path, monkeypatch):
    model = randomize(qsvft.prepare(load(llama, torch.float32), progress=False))
    model.save_pretrained(tmp_path / "adapter", include_factors=True)
    expected = logits(model.merge_and_unload())
    signs = decomposition._signs
    monkeypatch.setattr(decomposition, "_signs", lambda vectors: -signs(vectors) * signs(vectors.flip(0)))
    assert run(tmp_path / "adapter", tmp_path / "merged", "--base", llama).exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_what_stands_there_is_not_touched(trained, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = run(trained[1], tmp_path)
    assert result.exit_code == 2
    assert "holds something already" in result.output and "thesis.txt" in result.output
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def lacking_its_head(llama, folder):
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, folder / "model.safetensors", META)
    return folder


def test_a_base_without_its_head_is_refused_and_none_is_made_up(trained, llama, tmp_path):
    base = lacking_its_head(llama, tmp_path / "base")
    result = run(trained[1], tmp_path / "merged", "--base", base)
    assert result.exit_code == 2, result.output
    assert "no weights for 'lm_head.weight' of LlamaForCausalLM" in " ".join(result.output.split())
    assert list((tmp_path / "merged").iterdir()) == []


def test_a_head_that_the_adapter_brings_may_be_missing(llama, tmp_path):
    base = lacking_its_head(llama, tmp_path / "base")
    model = randomize(qsvft.prepare(load(llama), modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    for place in (base, llama):
        target = tmp_path / f"merged-{place.name}"
        assert run(tmp_path / "adapter", target, "--base", place).exit_code == 0
    merged = [AutoModelForCausalLM.from_pretrained(path) for path in tmp_path.glob("merged-*")]
    expected = logits(model.merge_and_unload())
    assert len(merged) == 2 and all(torch.equal(logits(one), expected) for one in merged)


def test_a_classifier_on_a_language_model_is_written_with_its_head(llama, tmp_path):
    def classifier():
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3, dtype=torch.bfloat16)

    model = randomize(qsvft.prepare(classifier(), rank=8, progress=False))
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", base=llama, progress=False)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert merged.num_labels == 3 and config_in(tmp_path / "dense")["architectures"] == [type(merged).__name__]
    assert torch.equal(logits(merged), logits(model.merge_and_unload()))


def test_trained_biases_and_rows_of_embeddings_are_written(tmp_path):
    source = family("qwen2", tmp_path / "source")
    for name, options in (("bias", {"bias": "qsvft_only"}), ("rows", {"trainable_token_indices": [5, 7]})):
        model = randomize(qsvft.from_pretrained(source, rank=8, progress=False, **options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "qsvft_M" not in key:
                    parameter.normal_()
        model.save_pretrained(tmp_path / name)
        qsvft.export(tmp_path / name, tmp_path / f"{name}-dense", format="dense", progress=False)
        compare(tmp_path / f"{name}-dense", model.merge_and_unload(), tmp_path / f"{name}-expected")


def test_a_tied_head_that_trained_by_itself_is_written_beside_the_embeddings(tmp_path):
    source = family("tied", tmp_path / "source")
    assert "lm_head.weight" not in tensors_in(source)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        model = randomize(qsvft.from_pretrained(source, rank=8, modules_to_save=["lm_head"], progress=False))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", progress=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert config_in(tmp_path / "dense")["tie_word_embeddings"] is False
    with pytest.warns(UserWarning, match="no longer tied"):
        assert torch.equal(logits(merged), logits(model.merge_and_unload()))


def test_nan_in_M_is_refused(llama, tmp_path):
    model = randomize(qsvft.prepare(load(llama)))
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "qsvft_M" in name)[0] = torch.nan
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", META)
    result = run(tmp_path / "adapter", tmp_path / "merged", "--base", llama)
    assert result.exit_code == 2 and "holds 1 NaN or Inf values" in " ".join(result.output.split())
    assert list((tmp_path / "merged").iterdir()) == []


def test_a_mixture_of_two_saves_leaves_nothing(trained, llama, tmp_path):
    prepared, adapter, _ = trained
    randomize(qsvft.from_pretrained(prepared, progress=False), scale=2.0).save_pretrained(tmp_path / "second")
    first, second = (load_file(one / "adapter_model.safetensors") for one in (adapter, tmp_path / "second"))
    mixed = {key: first[key] if "layers.0.self_attn.q_proj" in key else second[key] for key in second}
    save_file(mixed, tmp_path / "second" / "adapter_model.safetensors", META)
    result = run(tmp_path / "second", tmp_path / "merged")
    assert result.exit_code == 2 and "some are of another save" in " ".join(result.output.split())
    assert list((tmp_path / "merged").iterdir()) == []


def test_a_disk_without_room_is_said_before_anything_is_written(trained, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr("qsvft.storage.whole_files.shutil.disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    result = run(trained[1], tmp_path / "merged")
    assert result.exit_code == 2 and "are still to be written" in " ".join(result.output.split())
    assert list((tmp_path / "merged").iterdir()) == []


def test_what_a_killed_merge_left_is_not_taken_over(trained, tmp_path):
    (tmp_path / "merged" / SAVING).mkdir(parents=True)
    (tmp_path / "merged" / SAVING / "tokenizer.json").write_text("{}")
    assert run(trained[1], tmp_path / "merged").exit_code == 0
    expected = (trained[0] / "tokenizer.json").read_bytes()
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == expected
    assert not (tmp_path / "merged" / SAVING).exists()


@pytest.mark.parametrize("where", ["the directory that it runs in", "a link"])
def test_it_merges_into(trained, tmp_path, monkeypatch, where):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    assert run(trained[1], "." if where.endswith("in") else tmp_path / "link").exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "real")), trained[2])
    assert (tmp_path / "link").is_symlink()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "real").iterdir()} == {0o666 & ~umask()}


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_the_checkpoint_of_another_seed_is_refused(trained, tmp_path):
    other = save_llama(tmp_path / "source", seed=5)
    result = run(trained[1], tmp_path / "merged", "--base", other)
    assert result.exit_code == 2 and "does not fit the base model" in " ".join(result.output.split())
