"""Adapters that carry their factors: saved on request, loaded without decomposing, the same bit for bit."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import coefficients, load, logits, randomize, same_tensors, save_llama, tokens
from stored_models import forbid_decomposing, gpt2, layers, turn_signs
from torch import nn
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

import qsvft
from qsvft import QSVFTConfig
from qsvft.storage.factor_names import parse_name
from qsvft.storage.factors import StoredBasis
from qsvft.tuner.sources import sources_of, weights_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BANDED = {"pattern": "banded", "off_diagonals": 2}
ONE_SIDED = {**BANDED, "sides": "one"}
OPTIONS = {
    "default": {},
    "one-sided": ONE_SIDED,
    "one-sided in int8": {**ONE_SIDED, "factor_bits": 8},
    "one-sided in NF4": {**ONE_SIDED, "factor_bits": 4, "rank": 24},
    "two-sided": {**BANDED, "sides": "both"},
    "two-sided in int8": {"factor_bits": 8},
    "several ranks": {**ONE_SIDED, "rank": 20, "rank_pattern": {"k_proj": 30, "down_proj": 5}},
    "top_k": {**ONE_SIDED, "pattern": "top_k", "rank": 16},
    "randomized": {**ONE_SIDED, "decomposition": "randomized", "rank": 8},
    "residual": {**BANDED, "residual": True, "factor_bits": 8},
    "residual of a low rank": {"residual": True, "rank": 6},
}
FORMS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
EACH_FORM = pytest.mark.parametrize("form", [ONE_SIDED, {}], ids=["one-sided", "default"])


def base(llama, options=None, bits=4):
    model = load(llama)
    return model if (options or {}).get("residual") else qsvft.quantize(model, bits, progress=False)


def prepare(llama, **options):
    return randomize(qsvft.prepare(load(llama), bits=4, progress=False, **options))


def factors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if parse_name(name) is not None}


def made_elsewhere(llama, folder, **options):
    with pytest.MonkeyPatch.context() as patch:
        turn_signs(patch)
        model = prepare(llama, **options)
        model.save_pretrained(folder, include_factors=True)
    return folder, logits(model), coefficients(model)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """A self-contained one-sided adapter with its logits and its M; its signs do not come out like this here."""
    return made_elsewhere(llama, tmp_path_factory.mktemp("adapter"), **ONE_SIDED)


@pytest.fixture(scope="module")
def saved_default(llama, tmp_path_factory):
    """The same of the default form."""
    return made_elsewhere(llama, tmp_path_factory.mktemp("default"))


@pytest.fixture(params=["saved", "saved_default"])
def each_saved(request):
    """Both."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "adapter"))


def edit(adapter, change):
    found = load_file(adapter / WEIGHTS)
    change(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, adapter / WEIGHTS, {"format": "pt"})


def edit_config(adapter, **changes):
    path = adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.anywhere
@FORMS
def test_a_reloaded_adapter_is_the_same_bit_for_bit_and_nothing_is_decomposed(llama, tmp_path, options, monkeypatch):
    model = prepare(llama, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path, include_factors=True)
    forbid_decomposing(monkeypatch)
    again = PeftModel.from_pretrained(base(llama, options), tmp_path)
    assert torch.equal(logits(again), expected)
    assert same_tensors(coefficients(again), coefficients(model))
    for name, layer in layers(again).items():
        other = layers(model)[name]
        assert torch.equal(layer.qsvft_probe["default"], other.qsvft_probe["default"])
        assert [k for k in layer.qsvft_scale if not torch.equal(layer.qsvft_scale[k], other.qsvft_scale[k])] == []


@FORMS
def test_a_reloaded_adapter_is_saved_with_the_same_bytes_again(llama, tmp_path, options):
    prepare(llama, **options).save_pretrained(tmp_path / "first", include_factors=True)
    PeftModel.from_pretrained(base(llama, options), tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@FORMS
def test_another_model_is_refused_by_a_layers_name(llama, other_llama, tmp_path, options):
    prepare(llama, **options).save_pretrained(tmp_path, include_factors=True)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.\S+: this adapter does not fit the base model: the weight"
    ):
        PeftModel.from_pretrained(base(other_llama, options), tmp_path)


@pytest.mark.anywhere
@pytest.mark.parametrize(
    "options",
    [ONE_SIDED, {**ONE_SIDED, "factor_bits": 4}, {}],
    ids=["one-sided", "one-sided in NF4", "default"],
)
def test_Conv1D_layers_are_reloaded(tmp_path, options, monkeypatch):
    names = ["c_attn", "c_fc", "c_proj"]
    model = randomize(qsvft.prepare(gpt2(), bits=4, target_modules=names, progress=False, **options))
    expected = logits(model)
    model.save_pretrained(tmp_path, include_factors=True)
    forbid_decomposing(monkeypatch)
    again = PeftModel.from_pretrained(qsvft.quantize(gpt2(), 4, progress=False), tmp_path)
    assert torch.equal(logits(again), expected)


@pytest.mark.anywhere
@pytest.mark.parametrize("bits", [8, 16])
@EACH_FORM
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_other_bits_of_the_base_are_reloaded(llama, tmp_path, bits, form, monkeypatch):
    model = randomize(qsvft.prepare(load(llama), bits=bits, progress=False, **form))
    model.save_pretrained(tmp_path, include_factors=True)
    forbid_decomposing(monkeypatch)
    assert torch.equal(logits(PeftModel.from_pretrained(base(llama, bits=bits), tmp_path)), logits(model))


@EACH_FORM
def test_a_model_of_bare_layers_is_reloaded(tmp_path, form, monkeypatch):
    def fresh():
        torch.manual_seed(0)
        parts = {"q_proj": torch.nn.Linear(32, 40), "k_proj": torch.nn.Linear(32, 24), "out": torch.nn.Linear(48, 20)}
        return torch.nn.ModuleDict(parts)

    options = {"target_modules": ["q_proj", "k_proj", "out"], **form}
    model = randomize(qsvft.prepare(fresh(), bits=4, progress=False, **options))
    model.save_pretrained(tmp_path, include_factors=True)
    forbid_decomposing(monkeypatch)
    again = PeftModel.from_pretrained(qsvft.quantize(fresh(), 4, progress=False), tmp_path)
    for name, size in (("q_proj", 32), ("k_proj", 32), ("out", 48)):
        x = torch.randn(3, size)
        assert torch.equal(layers(again)[name](x), layers(model)[name](x))


def test_factors_are_written_as_far_as_each_layer_reads_them(llama, tmp_path):
    options = {**ONE_SIDED, "rank": 20, "rank_pattern": {"k_proj": 30}}
    prepare(llama, **options).save_pretrained(tmp_path, include_factors=True)
    found = {str(parse_name(name)): tensor for name, tensor in factors_in(tmp_path).items()}
    bases = {name: tuple(t.shape) for name, t in found.items() if name.endswith(".values")}
    for layer in (0, 1):
        assert bases[f"qsvft.model/layers/{layer}/self_attn/k_proj.U_bf16.values"] == (30, 32)
        assert bases[f"qsvft.model/layers/{layer}/mlp/down_proj.U_bf16.values"] == (20, 64)
    assert len(bases) == 14
    ranks = {name: len(t) for name, t in found.items() if name.endswith(".scale")}
    assert {name: rank for name, rank in ranks.items() if rank != 20} == {
        f"qsvft.model/layers/{layer}/self_attn/k_proj.U_bf16.scale": 30 for layer in (0, 1)
    }
    assert len(ranks) == 14 and sum(name.endswith(".sketch") for name in found) == 14


@EACH_FORM
def test_saving_without_factors_writes_what_it_wrote_before(llama, tmp_path, form):
    model = prepare(llama, **form)
    model.save_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "with", include_factors=True)
    model.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "with" / CONFIG).read_text())["include_factors"] is True
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    records = load_file(tmp_path / "before" / WEIGHTS)
    whole = load_file(tmp_path / "with" / WEIGHTS)
    assert {name for name in whole if parse_name(name) is None} == set(records)
    assert all(
        torch.equal(whole[name], t) for name, t in records.items() if not name.endswith(("qsvft_digest", "qsvft_whole"))
    )


def test_with_the_config_field_every_save_has_the_factors(llama, tmp_path):
    model = prepare(llama, include_factors=True)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", include_factors=False)
    assert factors_in(tmp_path / "a") and not factors_in(tmp_path / "b")
    assert model.peft_config["default"].include_factors


@EACH_FORM
def test_an_adapter_of_a_smaller_rank_carries_no_more_than_it_reads(llama, tmp_path, form, monkeypatch):
    model = prepare(llama, **form, rank=10, decomposition="exact")
    config = QSVFTConfig(**form, rank=30, decomposition="exact", task_type="CAUSAL_LM")
    model.add_adapter("larger", config)
    expected = logits(model)
    model.set_adapter("larger")
    larger = logits(randomize(model, "larger"))
    model.save_pretrained(tmp_path, include_factors=True)
    for folder, rank in ((tmp_path, 10), (tmp_path / "larger", 30)):
        assert {t.shape[0] for n, t in factors_in(folder).items() if n.endswith((".values", ".codes"))} == {rank}
    forbid_decomposing(monkeypatch)
    again = PeftModel.from_pretrained(base(llama), tmp_path)
    again.load_adapter(tmp_path / "larger", adapter_name="larger")
    assert torch.equal(logits(again), expected)
    again.set_adapter("larger")
    assert torch.equal(logits(again), larger)
    assert {b.rank for b in again.modules() if isinstance(b, StoredBasis)} == {30}


def test_only_the_selected_adapters_are_saved_with_factors(llama, tmp_path):
    model = prepare(llama)
    model.add_adapter("other", QSVFTConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, include_factors=True, selected_adapters=["other"])
    assert factors_in(tmp_path / "other") and not (tmp_path / WEIGHTS).exists()
    assert not any(config.include_factors for config in model.peft_config.values())


@pytest.mark.parametrize("name", ["codes", "V_int8", "model", "0"])
@EACH_FORM
def test_an_adapters_name_does_not_get_into_the_names_of_factors(llama, tmp_path, name, form):
    options = {**form, "factor_bits": 8, "progress": False}
    model = randomize(qsvft.prepare(load(llama), bits=4, adapter_name=name, **options), name)
    expected = logits(model)
    model.save_pretrained(tmp_path, include_factors=True)
    assert all(n.startswith("base_model.model.qsvft.model/layers/") for n in factors_in(tmp_path / name))
    again = PeftModel.from_pretrained(base(llama), tmp_path / name, adapter_name="another")
    assert torch.equal(logits(again), expected)


def test_include_factors_on_another_method_is_refused(llama, tmp_path):
    model = get_peft_model(load(llama), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"none of the adapters \['default'\] is a QSVFT one \(found LORA\)"):
        model.save_pretrained(tmp_path, include_factors=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).exists()


def test_factors_are_not_pickled(llama, tmp_path):
    with pytest.raises(ValueError, match="expected safe_serialization=True"):
        prepare(llama).save_pretrained(tmp_path, include_factors=True, safe_serialization=False)


def test_saving_over_the_adapter_that_was_loaded_works(llama, adapter):
    """The bases held are the old file's pages."""
    model = PeftModel.from_pretrained(base(llama), adapter, is_trainable=True)
    expected = logits(randomize(model, seed=9))
    model.save_pretrained(adapter)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base(llama), adapter)), expected)


@pytest.mark.anywhere
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_options_do_not_change_the_adapter(llama, each_saved, low_cpu_mem_usage, monkeypatch):
    forbid_decomposing(monkeypatch)
    model = PeftModel.from_pretrained(base(llama), each_saved[0], low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), each_saved[1])
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_config_that_was_read_before_knows_its_factors(llama, saved, monkeypatch):
    forbid_decomposing(monkeypatch)
    for config in (PeftConfig.from_pretrained(saved[0]), copy.deepcopy(QSVFTConfig.from_pretrained(saved[0]))):
        assert torch.equal(logits(PeftModel.from_pretrained(base(llama), saved[0], config=config)), saved[1])


def test_auto_models_take_the_factors(llama, tmp_path, monkeypatch):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings |= {"bnb_4bit_compute_dtype": torch.bfloat16}
    model = prepare(llama)
    model.save_pretrained(tmp_path, include_factors=True)
    forbid_decomposing(monkeypatch)
    again = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16, device_map="cpu"
    )
    assert torch.equal(logits(again), logits(model))


def test_transformers_load_adapter_takes_the_factors(llama, each_saved, monkeypatch):
    forbid_decomposing(monkeypatch)
    model = base(llama)
    model.load_adapter(str(each_saved[0]))
    assert torch.equal(logits(model), each_saved[1])


@EACH_FORM
def test_transformers_save_pretrained_writes_the_factors_of_the_config(llama, tmp_path, form, monkeypatch):
    model = base(llama)
    model.add_adapter(QSVFTConfig(**form, include_factors=True))
    expected = logits(randomize(model))
    model.save_pretrained(tmp_path)
    forbid_decomposing(monkeypatch)
    assert torch.equal(logits(PeftModel.from_pretrained(base(llama), tmp_path)), expected)
    again = base(llama)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), expected)


def test_a_subfolder_is_looked_into(llama, saved, tmp_path, monkeypatch):
    shutil.copytree(saved[0], tmp_path / "deep" / "adapter")
    forbid_decomposing(monkeypatch)
    model = PeftModel.from_pretrained(base(llama), str(tmp_path / "deep"), subfolder="adapter")
    assert torch.equal(logits(model), saved[1])


@pytest.fixture
def hub(saved, tmp_path):
    """A cache of the hub that has the adapter, at the top and in a subfolder."""
    repository, commit = tmp_path / "models--someone--adapter", "0" * 40
    for subfolder in ("deep", "."):
        shutil.copytree(saved[0], repository / "snapshots" / commit / subfolder, dirs_exist_ok=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path


def test_an_adapter_on_the_hub_takes_its_factors_from_there(llama, saved, hub, monkeypatch):
    forbid_decomposing(monkeypatch)
    model = PeftModel.from_pretrained(base(llama), "someone/adapter", cache_dir=str(hub))
    assert torch.equal(logits(model), saved[1])


@pytest.mark.parametrize("subfolder", [None, "deep", "none"])
def test_the_file_of_an_adapter_on_the_hub_is_found_or_there_is_none(hub, subfolder):
    options = {"cache_dir": str(hub), "revision": "main", "task_type": "what hf_hub_download does not know"}
    found = weights_file("someone/adapter", subfolder, options)
    if subfolder == "none":
        assert found is None
    else:
        assert Path(found).is_file() and Path(found).parent.name == (subfolder or "0" * 40)


def test_a_token_is_forgotten_once_the_file_is_there(saved):
    config = QSVFTConfig.from_pretrained(saved[0], token="secret")
    assert sources_of(config, nn.Identity()).own is not None
    assert "secret" not in repr(vars(config))


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = tokens(rows=1, seed=index)[0]
        return {"input_ids": row, "labels": row.clone()}


@EACH_FORM
def test_the_trainers_checkpoints_are_self_contained(llama, tmp_path, form, monkeypatch):
    model = prepare(llama, **form, include_factors=True)
    steps = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "save_strategy": "steps"}
    arguments = TrainingArguments(
        tmp_path, report_to="none", use_cpu=True, learning_rate=1e-2, load_best_model_at_end=True, **steps
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    expected, checkpoint = logits(model), trainer.state.best_model_checkpoint
    forbid_decomposing(monkeypatch)
    again = PeftModel.from_pretrained(base(llama), checkpoint)
    assert torch.equal(logits(again), expected)
    assert len(list(Path(tmp_path).glob(f"checkpoint-*/{WEIGHTS}"))) == 2


def test_an_adapter_of_other_signs_is_loaded_with_its_own_factors(llama, each_saved, monkeypatch):
    forbid_decomposing(monkeypatch)
    model = PeftModel.from_pretrained(base(llama), each_saved[0])
    assert torch.equal(logits(model), each_saved[1])


def test_adapters_of_different_factors_stand_side_by_side(llama, saved, tmp_path):
    """Each with its own directions, whichever is loaded first; those that agree hold them once."""
    here = prepare(llama, **ONE_SIDED)
    here.save_pretrained(tmp_path)
    for first, second in ((tmp_path, saved[0]), (saved[0], tmp_path)):
        model = PeftModel.from_pretrained(base(llama), first, adapter_name="first")
        model.load_adapter(second, adapter_name="second")
        model.load_adapter(second, adapter_name="third")
        for name, folder in (("first", first), ("second", second), ("third", second)):
            model.set_adapter(name)
            assert torch.equal(logits(model), saved[1] if folder == saved[0] else logits(here))
        assert all(len(layer.held_bases()) == 2 for layer in layers(model).values())


@pytest.mark.parametrize(("form", "bases"), [(ONE_SIDED, 1), ({}, 2)], ids=["one-sided", "default"])
def test_an_adapter_whose_factors_are_those_held_shares_them(llama, tmp_path, form, bases):
    model = prepare(llama, **form)
    model.save_pretrained(tmp_path, include_factors=True)
    model.load_adapter(tmp_path, adapter_name="again")
    assert all(len(layer.held_bases()) == bases for layer in layers(model).values())
    expected = logits(model)
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("first", "form"), [("saved", ONE_SIDED), ("saved_default", {})], ids=["one-sided", "default"])
def test_a_new_adapter_does_not_take_over_what_another_brought_along(llama, first, form, request):
    model = PeftModel.from_pretrained(base(llama), request.getfixturevalue(first)[0])
    model.add_adapter("new", QSVFTConfig(**form, task_type="CAUSAL_LM"))
    model.set_adapter("new")
    assert torch.equal(logits(randomize(model, "new")), logits(prepare(llama, **form)))


def test_a_copied_model_keeps_its_own_factors(llama, saved):
    model = PeftModel.from_pretrained(base(llama), saved[0])
    other = copy.deepcopy(model)
    randomize(model, seed=4)
    assert torch.equal(logits(other), saved[1])
    other.load_adapter(saved[0], adapter_name="again")
    assert all(len(layer.held_bases()) == 1 for layer in layers(other).values())


def test_a_base_that_another_kernel_rounded_is_taken_within_the_probes_tolerance(llama, each_saved):
    model = base(llama)
    for layer in model.model.layers:
        codes = layer.mlp.up_proj.weight.data
        codes[5, 0] = codes[5, 0] ^ 0x10
    expected = each_saved[1]
    found = logits(PeftModel.from_pretrained(model, each_saved[0]))
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_base_in_other_bits_is_refused(llama, each_saved, bits):
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.\S+: this adapter does not fit the base model"):
        PeftModel.from_pretrained(base(llama, bits=bits), each_saved[0])


@pytest.mark.parametrize("leaf", ["q_proj", "down_proj"])
def test_one_changed_weight_is_refused_by_its_name(llama, each_saved, leaf):
    model = load(llama)
    part = "self_attn" if leaf == "q_proj" else "mlp"
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{part}.{leaf}").weight.mul_(-1)
    with pytest.raises(ValueError, match=rf"^model\.layers\.1\.{part}\.{leaf}: this adapter does not fit"):
        PeftModel.from_pretrained(qsvft.quantize(model, 4, progress=False), each_saved[0])


def test_a_config_with_factors_makes_no_new_adapter_on_another_model(other_llama, each_saved):
    config = QSVFTConfig.from_pretrained(each_saved[0])
    config.base_model_name_or_path = None
    with pytest.raises(ValueError, match=r"make the config anew: QSVFTConfig\(\*\*config\.to_dict\(\)\)"):
        get_peft_model(base(other_llama), config)
    anew = QSVFTConfig(**{**config.to_dict(), "base_model_name_or_path": None})
    assert len(layers(get_peft_model(base(other_llama), anew))) == 14


@EACH_FORM
def test_a_refused_adapter_leaves_the_model_with_its_first_adapter_working(llama, other_llama, saved, tmp_path, form):
    prepare(other_llama, **form).save_pretrained(tmp_path, include_factors=True)
    model = PeftModel.from_pretrained(base(llama), saved[0])
    with pytest.raises(ValueError, match="does not fit the base model"):
        model.load_adapter(tmp_path, adapter_name="second")
    model.set_adapter("default")
    assert torch.equal(logits(model), saved[1])


VALUES = "base_model.model.qsvft.model/layers/1/self_attn/q_proj.V_bf16.values"
OUTPUT = "base_model.model.qsvft.model/layers/1/mlp/down_proj.U_bf16"
DAMAGE = {
    "another dtype": (VALUES, lambda t: t.float(), "is torch.float32 of shape"),
    "another width": (VALUES, lambda t: t[:, 1:], r"is \S+ of shape \(64, 63\), expected .*\(64, 64\)"),
    "NaN": (VALUES, lambda t: t.clone().index_fill_(0, torch.tensor(3), torch.nan), "is NaN or Inf in places"),
    "NaN scale": (f"{OUTPUT}.scale", lambda t: t * torch.nan, "is NaN or Inf in places"),
    "short scale": (f"{OUTPUT}.scale", lambda t: t[1:], r"is \S+ of shape \(63,\), expected .*\(64,\)"),
    "short sketch": (f"{OUTPUT}.sketch", lambda t: t[1:], r"is \S+ of shape \(7,\), expected .*\(8,\)"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_factor_that_does_not_fit_is_refused_by_its_name(llama, adapter, name, damage, message):
    edit(adapter, lambda found: found.update({name: damage(found[name])}))
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: the tensor {name} {message}"):
        PeftModel.from_pretrained(base(llama), adapter)


@pytest.mark.parametrize("name", [VALUES, f"{OUTPUT}.values", f"{OUTPUT}.scale", f"{OUTPUT}.sketch"])
def test_a_missing_factor_is_refused_by_its_name(llama, adapter, name):
    edit(adapter, lambda found: found.pop(name))
    with pytest.raises(ValueError, match=name.removeprefix("base_model.model.")):
        PeftModel.from_pretrained(base(llama), adapter)


@pytest.mark.parametrize("name", [VALUES, f"{OUTPUT}.values", f"{OUTPUT}.scale", f"{OUTPUT}.sketch"])
def test_a_changed_factor_is_refused(llama, adapter, name):
    """By so little that nothing but the digest sees it."""

    def change(found):
        tensor = found[name].clone()
        tensor.view(-1)[1] = tensor.view(-1)[1].nextafter(torch.tensor(9.0, dtype=tensor.dtype))
        found[name] = tensor

    edit(adapter, change)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.\S+: the adapter's contents do not match their digest"):
        PeftModel.from_pretrained(base(llama), adapter)


def test_factors_of_another_adapter_are_refused(llama, adapter, tmp_path):
    """They are whole and of the same weights, but not those that M was trained on."""
    prepare(llama, **ONE_SIDED).save_pretrained(tmp_path / "here", include_factors=True)
    others = factors_in(tmp_path / "here")
    edit(adapter, lambda found: found.update(others))
    with pytest.raises(ValueError, match="do not match their digest"):
        PeftModel.from_pretrained(base(llama), adapter)


@EACH_FORM
def test_an_adapter_without_the_factors_that_its_config_announces_is_refused(llama, tmp_path, form):
    prepare(llama, **form).save_pretrained(tmp_path)
    edit_config(tmp_path, include_factors=True)
    with pytest.raises(ValueError, match=r"says include_factors, but its file has no tensor qsvft\.model/layers/0/"):
        PeftModel.from_pretrained(base(llama), tmp_path)


@EACH_FORM
def test_factors_that_the_config_does_not_announce_are_not_used(llama, tmp_path, form):
    model = prepare(llama, **form)
    model.save_pretrained(tmp_path, include_factors=True)
    edit_config(tmp_path, include_factors=False)
    again = PeftModel.from_pretrained(base(llama), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert all(source is None for layer in layers(again).values() for source in layer.came_from.values())


@pytest.mark.parametrize("changes", [{"rank": 16}, {"factor_bits": 8}, {"sides": "both"}], ids=str)
def test_a_config_that_is_not_the_adapters_is_refused(llama, adapter, changes):
    edit_config(adapter, **changes)
    with pytest.raises(ValueError, match=r"layers[./]0"):
        PeftModel.from_pretrained(base(llama), adapter)


def test_random_byte_flips_are_refused_or_harmless(llama, tmp_path):
    """Every flip ends in ValueError or in bitwise the same adapter: never in another adapter."""
    model = prepare(llama, **ONE_SIDED, target_modules=["k_proj", "v_proj"], rank=8, factor_bits=8)
    model.save_pretrained(tmp_path, include_factors=True)
    expected, whole = logits(model), (tmp_path / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    fresh, refused = base(llama), 0
    for seed in range(90):
        draw = random.Random(seed)
        damaged = bytearray(whole)
        damaged[draw.randrange((8, header, len(whole))[seed % 3])] ^= draw.randrange(1, 256)
        (tmp_path / WEIGHTS).write_bytes(damaged)
        try:
            loaded = PeftModel.from_pretrained(fresh, tmp_path)
        except ValueError:
            refused += 1
            fresh = base(llama)
            continue
        assert torch.equal(logits(loaded), expected), f"the flip of seed {seed} gave another adapter"
        fresh = loaded.unload()
    assert refused > 60


def test_a_truncated_file_is_refused_by_its_path(llama, adapter):
    path = adapter / WEIGHTS
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"not a whole safetensors file .* save the adapter again"):
        PeftModel.from_pretrained(base(llama), adapter)


def test_an_adapter_of_another_shape_is_refused(tmp_path, saved):
    narrow = save_llama(tmp_path / "narrow", hidden_size=32, intermediate_size=48)
    with pytest.raises(ValueError, match=r"the tensor \S+ is .*, expected torch.bfloat16 of shape"):
        PeftModel.from_pretrained(base(narrow), saved[0])
