"""Every door through which an adapter comes in: the same checks and errors, and nothing that failed left in use."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_models import coefficients, load, logits, randomize, same_tensors
from transformers import AutoModelForCausalLM

import qsvft

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.1.self_attn.v_proj"
NAMED = r"^model\.layers\.1\.self_attn\.v_proj: "


def peft(base, folder):
    return PeftModel.from_pretrained(base, folder)


def peft_low_cpu_mem(base, folder):
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def transformers(base, folder):
    info = base.load_adapter(str(folder))
    assert not info.missing_keys and not info.unexpected_keys and not info.error_msgs
    return base


def transformers_state(base, folder):
    base.load_adapter(peft_config=PeftConfig.from_pretrained(folder), adapter_state_dict=load_peft_weights(folder))
    return base


def auto_model(_, folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def injected(base, folder):
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), base)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in load_peft_weights(folder).items()}
    set_peft_model_state_dict(base, tensors)
    return base


def ours(_, folder):
    base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    return qsvft.from_pretrained(base, adapter=folder, bits=16, dtype=torch.bfloat16, progress=False)


DOORS = (peft, peft_low_cpu_mem, transformers, transformers_state, auto_model, injected, ours)
EACH_DOOR = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """An adapter with a module trained whole, and its logits."""
    folder = tmp_path_factory.mktemp("adapter")
    model = randomize(qsvft.prepare(load(llama), 16, modules_to_save=["norm"], progress=False))
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "adapter")


def change(tensors):
    tensors[f"{LAYER}.qsvft_M.weight"][0] += 1


def make_nan(tensors):
    tensors[f"{LAYER}.qsvft_M.weight"][3] = float("nan")


def drop_layer(tensors):
    for key in [key for key in tensors if key.startswith(LAYER)]:
        del tensors[key]


def touch_base(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(96, 64, dtype=torch.bfloat16)


FAULTS = {
    "a changed M": (change, NAMED + ".* do not match their digest"),
    "NaN in M": (make_nan, NAMED + r"M of adapter 'default' holds 1 NaN or Inf values of \d+; expected finite"),
    "a layer that is missing": (drop_layer, NAMED + "the adapter file has no qsvft_M"),
    "a tensor of the base": (touch_base, "the adapter's file has .*; expected M, its records"),
}


@EACH_DOOR
def test_an_adapter_comes_in_whole_and_frozen(llama, saved, door):
    folder, expected = saved
    model = door(load(llama), folder)
    assert torch.equal(logits(model), expected)
    assert len(coefficients(model)) == 14
    if door in (transformers, transformers_state, auto_model, peft):
        assert not any(parameter.requires_grad for parameter in coefficients_of(model))


def coefficients_of(model):
    return [parameter for name, parameter in model.named_parameters() if "qsvft_M" in name]


@EACH_DOOR
@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_one_is_refused_in_the_same_words(llama, adapter, door, fault, message):
    tensors = load_file(adapter / WEIGHTS)
    fault(tensors)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        door(load(llama), adapter)


@pytest.mark.parametrize("door", [door for door in DOORS if door not in (auto_model, ours)], ids=lambda d: d.__name__)
def test_one_of_another_base_is_refused_in_the_same_words(other_llama, saved, door):
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: this adapter does not fit the base"):
        door(load(other_llama), saved[0])


@pytest.mark.parametrize("named", [{}, {"adapter_name": "new"}], ids=str)
def test_what_transformers_refused_is_gone_from_the_model(llama, adapter, named):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    base = load(llama)
    expected = logits(base)
    with pytest.raises(ValueError, match="do not match their digest"):
        base.load_adapter(str(adapter), **named)
    assert not base._hf_peft_config_loaded and torch.equal(logits(base), expected)


def test_what_peft_refused_and_leaves_attached_is_refused_when_it_is_used(llama, saved, adapter):
    model = PeftModel.from_pretrained(load(llama), saved[0])
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="do not match their digest"):
        model.load_adapter(adapter, "second")
    assert torch.equal(logits(model), saved[1])
    model.set_adapter("second")
    with pytest.raises(ValueError, match="adapter 'second' does not fit this base model"):
        logits(model)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT's, for any method
def test_transformers_can_train_it_and_takes_a_second_beside_it(llama, saved):
    model = load(llama)
    model.load_adapter(str(saved[0]), is_trainable=True)
    assert all(parameter.requires_grad for parameter in coefficients_of(model))
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(saved[0]))
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        transformers_state(model, saved[0])
    with pytest.raises(
        ValueError, match=r"hotswap=True\): found an adapter of QSVFT, .* peft.utils.hotswap.hotswap_adapter"
    ):
        model.load_adapter(
            peft_config=PeftConfig.from_pretrained(saved[0]), adapter_state_dict={}, adapter_name="b", hotswap=True
        )
    model.load_adapter(str(saved[0]), "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), saved[1])


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_state_of_another_base_is_refused_when_it_is_used(llama, other_llama, ran_before):
    foreign = randomize(qsvft.prepare(load(other_llama), 4, progress=False)).state_dict()
    foreign = {name: tensor for name, tensor in foreign.items() if "qsvft_" in name}
    model = qsvft.prepare(load(llama), 4, progress=False)
    if ran_before:
        logits(model)
    model.load_state_dict(foreign, strict=False)
    for use in (logits, lambda model: model.merge_and_unload()):
        with pytest.raises(ValueError, match=r"q_proj: adapter 'default' does not fit this base model"):
            use(model)


def test_a_state_with_nan_in_M_is_refused_by_its_layers_name(llama):
    model = qsvft.prepare(load(llama), 4, progress=False)
    name = f"{LAYER}.qsvft_M.default.weight"
    state, before = {name: model.state_dict()[name] + torch.inf}, coefficients(model)
    with pytest.raises(ValueError, match=NAMED + r"M of adapter 'default' holds \d+ NaN or Inf"):
        model.load_state_dict(state, strict=False)
    assert same_tensors(coefficients(model), before)


def test_accelerates_resume_checks_as_the_others(llama, other_llama, tmp_path):
    for source, resumed in ((llama, True), (other_llama, False)):
        model = randomize(qsvft.prepare(load(llama), 16, progress=False))
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(model)
        accelerator.save_state(tmp_path / source.name)
        again = qsvft.prepare(load(source), 16, progress=False)
        logits(again)
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(again)
        kept = {name: tensor.clone() for name, tensor in again.state_dict().items() if "qsvft_" not in name}
        accelerator.load_state(tmp_path / source.name)
        again.load_state_dict(kept, strict=False)  # a save of the whole model brings its base along
        if resumed:
            assert torch.equal(logits(again), logits(model))
        else:
            with pytest.raises(ValueError, match="does not fit this base model"):
                logits(again)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_training_left_broken_is_neither_saved_nor_merged(llama, tmp_path, value):
    model = randomize(qsvft.prepare(load(llama), 4, progress=False))
    with torch.no_grad():
        model.get_parameter(f"{LAYER}.qsvft_M.default.weight")[5] = value
    message = NAMED + r"M of adapter 'default' holds 1 NaN or Inf values of \d+; .* lower learning rate"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    with pytest.raises(ValueError, match=message.removeprefix("^")):  # PEFT's own words before it
        model.merge_and_unload()


@pytest.mark.parametrize("door", [peft, transformers, transformers_state], ids=lambda door: door.__name__)
def test_a_base_that_differs_by_less_than_the_probe_feels_is_said(llama, saved, door, caplog):
    base = load(llama)
    with caplog.at_level("WARNING", logger="qsvft"):
        door(load(llama), saved[0])
        assert not caplog.records
        with torch.no_grad():
            base.model.layers[1].mlp.down_proj.weight[3, 4] *= 1 + 2**-7  # its last bit
        door(base, saved[0])
    (record,) = caplog.records
    assert "1 of 14 layers, such as model.layers.1.mlp.down_proj, are not bit for bit those" in record.getMessage()
