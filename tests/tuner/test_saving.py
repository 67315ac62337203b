"""Saving an adapter, reading it back bit for bit, and refusing every file or base that does not fit."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_models import coefficients, load, logits, randomize, same_tensors, save_llama, tokens
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

import qsvft
from qsvft import QSVFTConfig
from qsvft.tuner import QSVFTLinear

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
ONE_SIDED = {"sides": "one", "pattern": "banded", "off_diagonals": 2}
EACH_FORM = pytest.mark.parametrize("form", [ONE_SIDED, {}], ids=["one-sided", "default"])


def base(folder, bits=4):
    return qsvft.quantize(load(folder), bits)


def by_transformers(folder, **changes):
    settings = {**NF4, "bnb_4bit_compute_dtype": torch.bfloat16, **changes}
    return load(folder, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu")


def trained(llama, folder, **options):
    model = randomize(qsvft.prepare(load(llama), bits=4, **options))
    model.save_pretrained(folder)
    return folder, logits(model), coefficients(model)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """A trained adapter of the one-sided form on the 4-bit model, on disk, with its logits and its M."""
    return trained(llama, tmp_path_factory.mktemp("adapter"), **ONE_SIDED)


@pytest.fixture(scope="module")
def saved_default(llama, tmp_path_factory):
    """One of the default form."""
    return trained(llama, tmp_path_factory.mktemp("default"))


@pytest.fixture(params=["saved", "saved_default"])
def each_saved(request):
    """Both."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of the saved adapter that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "adapter"))


@pytest.fixture
def default_adapter(saved_default, tmp_path):
    """The same of the other one."""
    return Path(shutil.copytree(saved_default[0], tmp_path / "default"))


def edit(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})


def edit_config(adapter, **changes):
    path = adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k", "dense"])
def test_the_file_holds_M_probe_base_and_digest_of_each_layer_and_no_factor(llama, tmp_path, pattern):
    model = qsvft.prepare(load(llama), bits=4, pattern=pattern, sides="both", off_diagonals=2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert (whole := tensors.pop("base_model.model.qsvft_whole")).dtype == torch.uint8 and whole.shape == (32,)
    layers = {key.partition(".qsvft_")[0] for key in tensors}
    leaves = {"qsvft_M.weight": torch.float32, "qsvft_probe": torch.float32}
    leaves |= {"qsvft_base": torch.uint8, "qsvft_digest": torch.uint8, "qsvft_unit": torch.float32}
    if pattern == "top_k":
        leaves["qsvft_entries"] = torch.int64
    assert len(layers) == 14
    assert {key: value.dtype for key, value in tensors.items()} == {
        f"{layer}.{leaf}": dtype for layer in layers for leaf, dtype in leaves.items()
    }


def test_the_config_records_how_the_base_was_held(saved):
    record = json.loads((saved[0] / CONFIG).read_text())["base"]
    assert record["weights"] == [
        {"bits": 4, "quant_type": "nf4", "double_quant": True, "block_size": 64, "dtype": "bfloat16"}
    ]
    assert set(record["versions"]) == {"qsvft", "torch", "transformers", "peft", "bitsandbytes"}


@EACH_FORM
def test_saving_twice_writes_the_same_bytes(llama, tmp_path, form):
    model = randomize(qsvft.prepare(load(llama), bits=4, **form))
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.anywhere
@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k", "dense"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_reloaded_adapter_has_the_same_outputs_bit_for_bit(llama, tmp_path, bits, pattern, sides):
    options = {"pattern": pattern, "sides": sides, "off_diagonals": 2, "rank": 24}
    model = qsvft.prepare(load(llama), bits=bits, **options)
    plain = logits(model)
    expected = logits(randomize(model))
    assert not torch.equal(plain, expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(llama, bits), tmp_path)
    assert torch.equal(logits(again), expected)
    assert same_tensors(coefficients(again), coefficients(model))


@pytest.mark.anywhere
@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}])
def test_loading_options_do_not_change_the_adapter(llama, each_saved, options):
    folder, expected, M = each_saved
    model = PeftModel.from_pretrained(base(llama), folder, **options)
    assert torch.equal(logits(model), expected)
    assert same_tensors(coefficients(model), M)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_reloaded_adapter_is_frozen_unless_asked_for(llama, saved):
    model = PeftModel.from_pretrained(base(llama), saved[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_trainable_reload_continues_training_M_alone(llama, each_saved, low_cpu_mem_usage):
    folder, _, before = each_saved
    model = PeftModel.from_pretrained(base(llama), folder, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(coefficients(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for name, M in coefficients(model).items():
        assert M.dtype == torch.float32
        assert not torch.equal(M, before[name])


def test_an_adapter_moves_between_a_model_loaded_in_4_bits_and_one_quantised_here(llama, each_saved, tmp_path):
    folder, expected, M = each_saved
    model = PeftModel.from_pretrained(by_transformers(llama), folder)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base(llama), tmp_path)
    assert torch.equal(logits(back), expected)
    assert same_tensors(coefficients(back), M)


def test_two_adapters_are_saved_and_loaded_side_by_side(llama, tmp_path):
    model = qsvft.prepare(load(llama), bits=4, adapter_name="a", **ONE_SIDED)
    top_k = {"sides": "one", "pattern": "top_k", "off_diagonals": 1, "rank": 16}
    model.add_adapter("b", QSVFTConfig(**top_k, task_type="CAUSAL_LM"))
    model.add_adapter("c", QSVFTConfig(task_type="CAUSAL_LM"))
    expected = {}
    for seed, name in enumerate("abc"):
        model.set_adapter(name)
        expected[name] = logits(randomize(model, name, seed=seed))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(llama), tmp_path / "a", adapter_name="a")
    for name in "bc":
        again.load_adapter(tmp_path / name, adapter_name=name)
    for name in "cba":
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name])


@EACH_FORM
def test_a_trained_head_is_saved_and_restored_with_the_adapter(llama, tmp_path, form):
    def classifier():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.bfloat16, num_labels=3)

    model = qsvft.prepare(classifier(), bits=4, **form)
    randomize(model)
    head = next(p for name, p in model.named_parameters() if "score.modules_to_save.default" in name)
    assert head.requires_grad
    with torch.no_grad():
        head.add_(1.0)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qsvft.quantize(classifier(), 4, skip_modules=["score"]), tmp_path)
    assert torch.equal(logits(again), expected)


WRONG_BASES = {
    "another checkpoint": lambda llama, other: base(other),
    "8 bits": lambda llama, other: base(llama, 8),
    "16 bits": lambda llama, other: base(llama, 16),
    "NF4 without double quantisation": lambda llama, other: by_transformers(llama, bnb_4bit_use_double_quant=False),
    "FP4": lambda llama, other: by_transformers(llama, bnb_4bit_quant_type="fp4"),
}
FOUND = {
    "another checkpoint": "'bits': 4",
    "8 bits": "'bits': 8",
    "16 bits": "'bits': 16",
    "NF4 without double quantisation": "'double_quant': False",
    "FP4": "'quant_type': 'fp4'",
}


@pytest.mark.parametrize("kind", WRONG_BASES)
def test_a_base_other_than_the_adapters_is_refused_with_both_named(llama, other_llama, each_saved, kind):
    model = WRONG_BASES[kind](llama, other_llama)
    with pytest.raises(ValueError, match="this adapter does not fit the base model") as refusal:
        PeftModel.from_pretrained(model, each_saved[0])
    message = str(refusal.value)
    assert message.startswith("model.layers.0.")
    assert "expected at most 0.01" in message
    there, _, here = message.partition("The adapter was made on")[2].partition("the model holds")
    assert all(part in there for part in ("'bits': 4", "'quant_type': 'nf4'", "'double_quant': True"))
    assert FOUND[kind] in here
    assert "Load it on the same checkpoint" in message


@pytest.mark.parametrize(
    ("form", "changed"),
    [
        ("saved", "down_proj"),
        ("saved", "up_proj"),
        ("saved_default", "up_proj"),
    ],
)
def test_one_changed_weight_matrix_is_refused_by_its_name(llama, form, changed, request):
    model = load(llama)
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.mlp.{changed}").weight.mul_(-1)
    message = rf"^model\.layers\.1\.mlp\.{changed}: this adapter does not fit .*; the weight is another one"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(qsvft.quantize(model, 4), request.getfixturevalue(form)[0])


def test_an_adapter_of_another_shape_is_refused_by_name_and_both_shapes(tmp_path, saved):
    narrow = save_llama(tmp_path / "narrow", hidden_size=32, intermediate_size=48)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.\S+: the adapter's M is .* expected torch.float32 of shape"
    ):
        PeftModel.from_pretrained(base(narrow), saved[0])


def test_an_adapter_with_more_layers_than_the_model_is_refused(tmp_path, saved):
    shallow = save_llama(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"layers\.1\..*no such adapted layer|target_modules: 'model.layers.1"):
        PeftModel.from_pretrained(base(shallow), saved[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 16},
        {"rank_pattern": {"q_proj": 8}},
        {"pattern": "plain"},
        {"off_diagonals": 3},
        {"pattern": "random"},
        {"pattern": "top_k"},
        {"sides": "both"},
        {"factor_bits": 4},
    ],
    ids=str,
)
def test_a_config_that_is_not_the_adapters_is_refused_with_the_layers_name(llama, adapter, changes):
    edit_config(adapter, **changes)
    refused_by_name(llama, adapter)


@pytest.mark.parametrize(
    "changes",
    [{"rank": 16}, {"rank_pattern": {"q_proj": 8}}, {"pattern": "banded"}, {"sides": "one"}, {"factor_bits": 4}],
    ids=str,
)
def test_a_config_that_is_not_that_of_a_default_adapter_is_refused_too(llama, default_adapter, changes):
    edit_config(default_adapter, **changes)
    refused_by_name(llama, default_adapter)


def refused_by_name(llama, adapter):
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.") as refusal:
        PeftModel.from_pretrained(base(llama), adapter)
    assert any(hint in str(refusal.value) for hint in ("the adapter again", "another model or config", "Load it on"))


def test_another_seed_of_a_random_pattern_is_refused(llama, tmp_path):
    randomize(qsvft.prepare(load(llama), bits=4, **{**ONE_SIDED, "pattern": "random"}, seed=1)).save_pretrained(
        tmp_path
    )
    edit_config(tmp_path, seed=2)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\..*pattern \('random', seed 2\) does not come out the same"
    ):
        PeftModel.from_pretrained(base(llama), tmp_path)


LAYER = "base_model.model.model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("leaf", ["qsvft_M.weight", "qsvft_probe", "qsvft_base", "qsvft_unit", "qsvft_digest"])
def test_a_changed_value_is_refused_by_its_layers_name(llama, adapter, leaf):
    def change(tensors):
        tensor = tensors[f"{LAYER}.{leaf}"].view(-1)
        tensor[0] = tensor[0] + 1

    edit(adapter, change)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj: .*do not match their digest"):
        PeftModel.from_pretrained(base(llama), adapter)


@pytest.mark.parametrize("unit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_unit_that_no_weight_has_is_refused_by_its_layers_name(llama, adapter, unit):
    edit(adapter, lambda tensors: tensors.update({f"{LAYER}.qsvft_unit": torch.tensor(unit)}))
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj: .*unit is .*expected one finite"):
        PeftModel.from_pretrained(base(llama), adapter)


@pytest.mark.parametrize("leaf", ["qsvft_M.weight", "qsvft_probe", "qsvft_base", "qsvft_unit", "qsvft_digest"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5)], ids=str)
def test_a_tensor_of_another_shape_is_refused_by_its_layers_name(llama, adapter, leaf, shape):
    def change(tensors):
        key = f"{LAYER}.{leaf}"
        tensors[key] = torch.zeros(shape, dtype=tensors[key].dtype)

    edit(adapter, change)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj: "):
        PeftModel.from_pretrained(base(llama), adapter)


@pytest.mark.parametrize("leaf", ["qsvft_M.weight", "qsvft_probe", "qsvft_base", "qsvft_unit", "qsvft_digest"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_a_tensor_of_another_dtype_is_refused_or_read_as_the_same_adapter(llama, adapter, saved, leaf, dtype):
    edit(adapter, lambda tensors: tensors.update({f"{LAYER}.{leaf}": tensors[f"{LAYER}.{leaf}"].to(dtype)}))
    assert refused_or_the_same(llama, adapter, saved[2])


@pytest.mark.parametrize("leaf", ["qsvft_M.weight", "qsvft_probe", "qsvft_base", "qsvft_unit", "qsvft_digest"])
def test_a_missing_record_is_refused_by_its_layers_name(llama, adapter, leaf):
    edit(adapter, lambda tensors: tensors.pop(f"{LAYER}.{leaf}"))
    with pytest.raises(ValueError, match=rf"^model\.layers\.1\.self_attn\.v_proj: .* has no {leaf} .*save the adapter"):
        PeftModel.from_pretrained(base(llama), adapter)


def test_a_missing_layer_is_refused_by_its_name(llama, adapter):
    def change(tensors):
        for key in [key for key in tensors if key.startswith(LAYER)]:
            del tensors[key]

    edit(adapter, change)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj: the adapter file has no qsvft_M"):
        PeftModel.from_pretrained(base(llama), adapter)


def test_an_extra_layer_is_refused_by_its_name(llama, adapter):
    extra = {"base_model.model.model.layers.7.up_proj.qsvft_M.weight": torch.zeros(4)}
    edit(adapter, lambda tensors: tensors.update(extra))
    with pytest.raises(ValueError, match=r"^model\.layers\.7\.up_proj: .*no such adapted layer .*another model"):
        PeftModel.from_pretrained(base(llama), adapter)


def test_top_k_entries_that_are_not_a_pattern_are_refused(llama, tmp_path):
    trained(llama, tmp_path / "whole", **{**ONE_SIDED, "pattern": "top_k"})
    for number, bad in enumerate((-1, 10**9, "twice", "short", "float")):
        adapter = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(number)))

        def change(tensors, bad=bad):
            key = f"{LAYER}.qsvft_entries"
            entries = tensors[key].clone()
            if bad == "twice":
                entries[1] = entries[0]
            elif bad == "short":
                entries = entries[:-1].clone()
            elif bad == "float":
                entries = entries.double()
            else:
                entries[0] = bad
            tensors[key] = entries

        edit(adapter, change)
        with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj: .*entries are not usable"):
            PeftModel.from_pretrained(base(llama), adapter)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1, -1000])
def test_a_truncated_weight_file_is_refused_by_its_path(llama, adapter, size):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"not a whole safetensors file .* save the adapter again") as refusal:
        PeftModel.from_pretrained(base(llama), adapter)
    assert str(adapter / WEIGHTS) in str(refusal.value)
    assert f"found {len(content[:size])} bytes" in str(refusal.value)


@pytest.mark.parametrize("content", [b"garbage" * 99, b"\xff" * 64, b"PK\x03\x04" + b"\x00" * 200])
def test_a_garbage_weight_file_is_refused_by_its_path(llama, adapter, content):
    (adapter / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a whole safetensors file"):
        PeftModel.from_pretrained(base(llama), adapter)


@pytest.mark.parametrize("content", ["", "{", "not json"])
def test_a_broken_config_is_refused(llama, adapter, content):
    """PEFT reads the method's name from the file before the config class sees it: the message is json's own."""
    (adapter / CONFIG).write_text(content)
    with pytest.raises(ValueError, match="Expecting"):
        PeftModel.from_pretrained(base(llama), adapter)


def test_a_refused_adapter_leaves_the_model_with_its_first_adapter_working(llama, other_llama, each_saved, tmp_path):
    foreign = tmp_path / "foreign"
    trained(other_llama, foreign, **ONE_SIDED)
    folder, expected, _ = each_saved
    model = PeftModel.from_pretrained(base(llama), folder)
    with pytest.raises(ValueError, match="does not fit the base model"):
        model.load_adapter(foreign, adapter_name="second")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


def refused_or_the_same(llama, adapter, M):
    """Whether loading raises ValueError or gives bitwise these coefficients."""
    try:
        model = PeftModel.from_pretrained(base(llama), adapter)
    except ValueError:
        return True
    return same_tensors(coefficients(model), M)


def test_random_byte_flips_are_refused_or_harmless(llama, tmp_path):
    """Every flip ends in ValueError or in bitwise the same adapter: never in another adapter."""
    target = ["layers.0.self_attn.k_proj", "layers.1.mlp.down_proj"]
    options = {"target_modules": target, "off_diagonals": 1, "rank": 12, "pattern": "top_k"}
    model = randomize(qsvft.prepare(load(llama), bits=16, **options))
    model.save_pretrained(tmp_path)
    M, whole = coefficients(model), (tmp_path / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    fresh, refused = load(llama), 0
    for seed in range(210):
        draw = random.Random(seed)
        damaged = bytearray(whole)
        reach = (8, header, len(whole))[seed % 3]
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(reach)] ^= draw.randrange(1, 256)
        (tmp_path / WEIGHTS).write_bytes(damaged)
        try:
            loaded = PeftModel.from_pretrained(fresh, tmp_path)
        except ValueError:
            refused += 1
            fresh = load(llama)
            continue
        assert same_tensors(coefficients(loaded), M), f"flips of seed {seed} gave another adapter"
        fresh = loaded.unload()
    assert refused > 140


def test_a_disk_that_fills_up_midway_leaves_the_old_adapter_whole(llama, saved, adapter):
    """A limit on file size makes the writer itself fail in the middle of the weights."""
    model = PeftModel.from_pretrained(base(llama), saved[0], is_trainable=True)
    randomize(model, seed=77)
    before = sorted(os.listdir(adapter))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((adapter / WEIGHTS).stat().st_size // 2, limits[1]))
    try:
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            model.save_pretrained(adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(adapter)) == before
    again = PeftModel.from_pretrained(base(llama), adapter)
    assert same_tensors(coefficients(again), saved[2])
    assert torch.equal(logits(again), saved[1])


def test_a_shard_of_m_is_not_saved_in_its_place(llama, saved, adapter):
    model = PeftModel.from_pretrained(base(llama), saved[0], is_trainable=True)
    layer = next(module for module in model.modules() if isinstance(module, QSVFTLinear))
    layer.qsvft_M["default"].weight.data = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"q_proj: M of adapter 'default' has shape \(3,\), expected \(\d+,\): .*Gather"
    ):
        model.save_pretrained(adapter)
    again = PeftModel.from_pretrained(base(llama), adapter)
    assert torch.equal(logits(again), saved[1])


def test_a_state_of_what_trains_is_enough_to_save(llama, saved, adapter):
    model = PeftModel.from_pretrained(base(llama), saved[0], is_trainable=True)
    randomize(model, seed=77)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(adapter, state_dict=trained)
    assert torch.equal(logits(PeftModel.from_pretrained(base(llama), adapter)), logits(model))


def test_a_part_of_a_state_is_selected_as_it_is_and_not_saved_over_a_whole_adapter(llama, saved, adapter):
    model = PeftModel.from_pretrained(base(llama), saved[0], is_trainable=True)
    whole, part = get_peft_model_state_dict(model), {k: v for k, v in model.state_dict().items() if "layers.1" in k}
    found = get_peft_model_state_dict(model, state_dict=part)
    assert set(found) == {key for key in whole if "layers.1" in key or key.endswith("qsvft_whole")}
    assert all(torch.equal(found[key], whole[key]) for key in found if "layers.1" in key)
    assert get_peft_model_state_dict(model, state_dict={}) == {}
    with pytest.raises(
        ValueError, match=r"has M of 7 of the 14 layers of adapter 'default', not of model\.layers\.0\."
    ):
        model.save_pretrained(adapter, state_dict=part)
    model.save_pretrained(adapter, state_dict={}, is_main_process=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base(llama), adapter)), saved[1])


@contextmanager
def killed_at_the_end(process):
    """A process that is stopped would be waited for for ever where a test fails."""
    try:
        yield
    finally:
        process.kill()


def test_a_process_killed_while_it_saves_in_a_loop_leaves_a_whole_adapter(llama, tmp_path):
    code = (
        "import sys, torch, qsvft, transformers\n"
        "transformers.utils.logging.disable_progress_bar()\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
        "model = qsvft.prepare(model, bits=4)\n"
        "while True:\n"
        "    model.save_pretrained(sys.argv[2])\n"
        "    print('saved', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(llama), str(tmp_path / "adapter")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process, killed_at_the_end(process):
        assert process.stdout.readline() == b"saved\n", process.stderr.read().decode()
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        fresh = load(llama)
        for _ in range(8):
            process.send_signal(signal.SIGCONT)
            time.sleep(random.uniform(0.001, 0.03))
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # a signal takes its time on a busy machine
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "adapter", copy)
            PeftModel.from_pretrained(qsvft.quantize(fresh, 4), copy)
            shutil.rmtree(copy)
            fresh = load(llama)
    PeftModel.from_pretrained(base(llama), tmp_path / "adapter")


def with_tensor(folder, target, key, tensor):
    """A copy of an adapter whose file has one tensor more."""
    shutil.copytree(folder, target)
    save_file({**load_file(folder / WEIGHTS), key: tensor}, target / WEIGHTS)
    return target


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize(
    "key",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "lm_head.modules_to_save.other.weight",
        "anything",
    ],
)
def test_an_adapter_that_brings_tensors_of_the_base_is_refused_and_changes_nothing(llama, saved, tmp_path, prefix, key):
    model = base(llama)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bad = with_tensor(saved[0], tmp_path / "bad", f"{prefix}{key}", torch.full((4, 4), 7.0))
    with pytest.raises(ValueError, match=rf"{key}: the adapter's file has (no|a) tensor .* modules_to_save"):
        PeftModel.from_pretrained(model, bad)
    after = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_embeddings_that_peft_saves_beside_an_adapter_have_to_be_those_of_the_base(llama, saved, tmp_path):
    model = PeftModel.from_pretrained(base(llama), saved[0])
    model.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "same" / WEIGHTS))
    again = PeftModel.from_pretrained(base(llama), tmp_path / "same")
    assert torch.equal(logits(again), saved[1])
    other = model.get_input_embeddings().weight.detach().clone()
    other[5] += 1
    bad = with_tensor(saved[0], tmp_path / "other", "base_model.model.model.embed_tokens.weight", other)
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight: the adapter's file has a tensor of the base with"
    ):
        PeftModel.from_pretrained(base(llama), bad)


def test_a_probe_of_a_layer_that_is_not_adapted_is_refused(llama, saved, tmp_path):
    bad = with_tensor(saved[0], tmp_path / "bad", "base_model.model.lm_head.qsvft_probe", torch.zeros(8))
    with pytest.raises(ValueError, match="lm_head: the adapter has an M for this layer, but the model has no such"):
        PeftModel.from_pretrained(base(llama), bad)
