"""Options that earlier versions had: what was saved with one is refused by its name, however it is read."""

import json
import re

import pytest
from peft import PeftConfig
from small_models import load

import qsvft
from qsvft import QSVFTConfig

REFUSED = [
    {"share_inputs": True},
    {"share_inputs": [["q_proj", "k_proj"]]},
    {"tail_damping": 0.0},
    {"basis": "hadamard"},
    {"share_inputs": True, "basis": "hadamard", "tail_damping": 0.1},
]
HARMLESS = [{"share_inputs": False, "tail_damping": 0.1}, {"share_inputs": None}, {"share_inputs": []}]


def fields(folder):
    return json.loads((folder / "adapter_config.json").read_text())


READERS = {
    "our class": lambda folder: QSVFTConfig.from_pretrained(str(folder)),
    "PEFT's class": lambda folder: PeftConfig.from_pretrained(str(folder)),
    "a dict to our class": lambda folder: QSVFTConfig.from_peft_type(**fields(folder)),
    "a dict to PEFT's class": lambda folder: PeftConfig.from_peft_type(**fields(folder)),
}
EACH_READER = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def saved(folder, changes):
    QSVFTConfig(sides="one", rank=12).save_pretrained(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps({**fields(folder), **changes}))
    return folder


@EACH_READER
@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_a_config_saved_with_an_option_that_is_gone_is_refused(tmp_path, changes, read):
    found = {name: value for name, value in changes.items() if value != 0.1}
    message = f"adapter_config.json: found {', '.join(f'{name}={value!r}' for name, value in found.items())}, which "
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        read(saved(tmp_path, changes))
    assert "Use the version that made it, merge the adapter with that one" in str(refusal.value)


@EACH_READER
@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_a_value_that_changed_nothing_is_passed_over_without_a_word(tmp_path, changes, read):
    assert read(saved(tmp_path, changes)).to_dict() == QSVFTConfig(sides="one", rank=12).to_dict()


def test_given_anew_it_is_an_option_like_any_other_unknown_one(llama):
    with pytest.raises(TypeError, match="unexpected keyword argument 'share_inputs'"):
        QSVFTConfig(share_inputs=False)
    with pytest.raises(ValueError, match=r"prepare\(\): unknown option 'tail_damping'; expected one of "):
        qsvft.prepare(load(llama), tail_damping=0.1)
    with pytest.raises(ValueError, match=r"QSVFTConfig\.basis: expected one of 'singular', 'data', got 'hadamard'"):
        qsvft.prepare(load(llama), basis="hadamard")


def test_another_methods_option_of_the_same_name_is_not_ours():
    with pytest.warns(UserWarning, match="share_inputs"):
        assert PeftConfig.from_peft_type(peft_type="LORA", task_type="CAUSAL_LM", share_inputs=True).r == 8
