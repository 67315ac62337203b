"""qsvft as a PEFT method, and through transformers' own PEFT integration."""

import inspect
import json
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from small_models import load, logits, randomize

import qsvft
from qsvft import QSVFTConfig
from qsvft.tuner import QSVFTLinear
from qsvft.tuner.registration import QSVFT, register

FORMS = [{"sides": "one", "pattern": "banded", "off_diagonals": 4}, {}]
EACH_FORM = pytest.mark.parametrize("form", FORMS, ids=["one-sided", "default"])


def test_the_method_is_a_real_member_of_peft_type():
    assert isinstance(QSVFT, PeftType)
    assert PeftType("QSVFT") is PeftType["QSVFT"] is PeftType.QSVFT is QSVFT
    assert (QSVFT.value, QSVFT.name, QSVFT) == ("QSVFT", "QSVFT", "QSVFT")
    assert list(PeftType).count(QSVFT) == 1
    assert QSVFT in set(PeftType)


def test_the_member_survives_pickling_json_and_hashing():
    assert pickle.loads(pickle.dumps(QSVFT)) is QSVFT
    assert json.loads(json.dumps({"type": QSVFT})) == {"type": "QSVFT"}
    assert {QSVFT: 1}[PeftType("QSVFT")] == 1


def test_the_other_members_are_as_before():
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="no_such_method"):
        PeftType("no_such_method")


def test_registering_twice_changes_nothing():
    before = (list(PeftType), dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING))
    register()
    assert (list(PeftType), dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)) == before


def test_what_is_wrapped_of_peft_is_wrapped_once_and_keeps_its_signature():
    register()
    for wrapped in (PeftModel.save_pretrained, peft.PeftConfig.from_pretrained.__func__):
        assert wrapped.__wrapped__.__module__.startswith("peft.") and not hasattr(wrapped.__wrapped__, "__wrapped__")
        assert inspect.signature(wrapped) == inspect.signature(wrapped.__wrapped__)


def test_other_methods_are_saved_and_read_as_before(llama, tmp_path):
    model = get_peft_model(load(llama), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama), tmp_path, config=peft.PeftConfig.from_pretrained(tmp_path))
    assert isinstance(again.peft_config["default"], peft.LoraConfig)
    assert torch.equal(logits(again), expected)


def test_peft_knows_the_config_and_the_tuner():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[QSVFT] is QSVFTConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[QSVFT] is qsvft.QSVFTModel
    assert isinstance(peft.get_peft_config({"peft_type": "QSVFT", "seed": 4}), QSVFTConfig)


@EACH_FORM
def test_get_peft_model_gives_the_same_adapter_as_prepare(llama, form):
    ours = qsvft.prepare(load(llama), bits=4, **form)
    theirs = get_peft_model(qsvft.quantize(load(llama), bits=4), QSVFTConfig(**form, task_type="CAUSAL_LM"))
    assert torch.equal(logits(randomize(ours)), logits(randomize(theirs)))
    assert theirs.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()


@pytest.mark.parametrize("bits", [4, 16])
@EACH_FORM
def test_transformers_add_adapter_and_load_adapter_work_end_to_end(llama, tmp_path, bits, form):
    model = qsvft.quantize(load(llama), bits)
    model.add_adapter(QSVFTConfig(**form))
    randomize(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = qsvft.quantize(load(llama), bits)
    plain = logits(again)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), expected)
    again.disable_adapters()
    assert torch.equal(logits(again), plain)
    assert not torch.equal(plain, expected)


@EACH_FORM
def test_an_adapter_saved_by_transformers_loads_through_peft_and_the_reverse(llama, tmp_path, form):
    model = qsvft.quantize(load(llama), 4)
    model.add_adapter(QSVFTConfig(**form))
    expected = logits(randomize(model))
    model.save_pretrained(tmp_path / "transformers")
    peft_model = PeftModel.from_pretrained(qsvft.quantize(load(llama), 4), tmp_path / "transformers")
    assert torch.equal(logits(peft_model), expected)
    peft_model.save_pretrained(tmp_path / "peft")
    again = qsvft.quantize(load(llama), 4)
    again.load_adapter(str(tmp_path / "peft"))
    assert torch.equal(logits(again), expected)


@EACH_FORM
def test_transformers_load_adapter_refuses_a_wrong_base(llama, other_llama, tmp_path, form):
    randomize(qsvft.prepare(load(llama), bits=4, **form)).save_pretrained(tmp_path)
    other = qsvft.quantize(load(other_llama), 4)

    def use():
        other.load_adapter(str(tmp_path))
        logits(other)

    with pytest.raises(ValueError, match=r"layers\.0\..*does not fit th"):
        use()


def test_without_importing_qsvft_loading_raises_the_documented_key_error(llama, tmp_path):
    qsvft.prepare(load(llama), bits=16, target_modules=["q_proj"]).save_pretrained(tmp_path)
    code = (
        "import sys\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "try:\n"
        "    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "except KeyError as error:\n"
        "    print(repr(error))\n"
        "assert 'qsvft' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "KeyError('QSVFT')"


@pytest.mark.parametrize("bits", [4, 16])
def test_peft_knows_how_the_base_is_quantised(llama, bits):
    model = get_peft_model(qsvft.quantize(load(llama), 4) if bits == 4 else load(llama), QSVFTConfig(rank=4))
    layer = next(module for module in model.modules() if isinstance(module, QSVFTLinear))
    assert ("quantization_backend='bnb 4bit'" in repr(layer)) == (bits == 4)
    assert f"in_features={layer.in_features}, out_features={layer.out_features}" in repr(layer)
