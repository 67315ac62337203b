"""The plugin for axolotl does what axolotl asks of an adapter's plugin; a stand-in has the names that it uses of it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, same_tensors
from transformers import AutoModelForCausalLM

import qsvft
from qsvft.storage.quantization import held_bits

pydantic = pytest.importorskip("pydantic", reason="axolotl's configuration is pydantic's, which is not installed")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    pass


class Config(SimpleNamespace):
    """As axolotl's: what is not given is None."""

    def __getattr__(self, name):
        return None


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's module, imported where axolotl is the stand-in."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    base = sys.modules["axolotl.integrations.base"]
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, BasePlugin
    monkeypatch.syspath_prepend(EXAMPLES)
    import axolotl_plugin

    yield axolotl_plugin
    del sys.modules["axolotl_plugin"]


def asked(**given):
    return Config(adapter="qsvft", **{"qsvft": {"rank": 8, "progress": False}, **given})


def test_it_names_its_adapter_and_its_key(plugin):
    made = plugin.QSVFTPlugin()
    assert made.get_adapter_capabilities() == [AdapterCapabilities("qsvft", lora_like=False)]
    module, _, name = made.get_input_args().rpartition(".")
    assert getattr(sys.modules[module], name) is plugin.QSVFTArgs
    assert plugin.QSVFTArgs(qsvft={"rank": 8}).qsvft == {"rank": 8}
    assert plugin.QSVFTArgs().qsvft is None


def test_other_adapters_are_left_to_axolotl(plugin, llama):
    model = load(llama)
    assert plugin.QSVFTPlugin().load_adapter(model, Config(adapter="lora")) is None
    assert not isinstance(model, PeftModel) and not hasattr(model, "peft_config")


@pytest.mark.parametrize(("given", "bits"), [({"load_in_4bit": True}, 4), ({"load_in_8bit": True}, 8), ({}, 16)])
def test_a_new_adapter_is_that_of_prepare_on_a_base_of_the_bits_asked_for(plugin, llama, given, bits):
    model, config = plugin.QSVFTPlugin().load_adapter(load(llama), asked(**given))
    alone = qsvft.prepare(load(llama), bits, rank=8, task_type="CAUSAL_LM", progress=False)
    assert config is model.peft_config["default"] and config.rank == 8
    assert held_bits(model) == bits
    assert coefficients(model).keys() == coefficients(alone).keys()
    assert logits(randomize(model)).equal(logits(randomize(alone)))


@pytest.mark.parametrize("wanted", [True, False])
def test_activations_are_checkpointed_where_axolotl_is_told_to(plugin, llama, wanted):
    model, _ = plugin.QSVFTPlugin().load_adapter(load(llama), asked(gradient_checkpointing=wanted))
    assert model.is_gradient_checkpointing is wanted


def test_a_prepared_directory_is_a_base_as_it_is(plugin, llama, tmp_path):
    qsvft.prepare_checkpoint(llama, tmp_path / "prepared", rank=8, progress=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared")
    model, _ = plugin.QSVFTPlugin().load_adapter(base, asked(load_in_4bit=True))
    alone = qsvft.from_pretrained(tmp_path / "prepared", rank=8, progress=False)
    assert logits(randomize(model)).equal(logits(randomize(alone)))


@pytest.mark.parametrize("inference", [True, False])
def test_an_adapter_that_was_saved_is_loaded_and_trains_unless_it_is_to_answer(plugin, llama, tmp_path, inference):
    trained = randomize(qsvft.prepare(load(llama), 16, rank=8, progress=False))
    trained.save_pretrained(tmp_path)
    model, config = plugin.QSVFTPlugin().load_adapter(load(llama), asked(lora_model_dir=str(tmp_path)), inference)
    assert same_tensors(coefficients(model), coefficients(trained)) and config.rank == 8
    assert any(M.requires_grad for name, M in model.named_parameters()) is not inference


def test_a_trainer_that_attaches_it_itself_gets_the_config_alone(plugin, llama):
    model, config = plugin.QSVFTPlugin().load_adapter(load(llama), asked(qsvft={"rank": 8}), config_only=True)
    assert model is None and isinstance(config, qsvft.QSVFTConfig)
    assert (config.rank, config.task_type) == (8, "CAUSAL_LM")
