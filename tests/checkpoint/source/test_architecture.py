"""The model of a checkpoint, built without values: which configs are taken, and which are refused and why."""

import json

import pytest
import torch
from small_models import load, save_llama
from transformers import LlamaConfig, LlamaForCausalLM

from qsvft.checkpoint.source.checkpoint import open_checkpoint
from qsvft.checkpoint.source.names import empty_model, model_class


@pytest.fixture
def folder(tmp_path):
    return save_llama(tmp_path, tie_word_embeddings=True)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_model_is_on_meta_tied_frozen_and_in_eval_mode(folder):
    model = empty_model(open_checkpoint(folder))
    assert type(model) is LlamaForCausalLM
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_the_config_is_that_of_the_loaded_model(folder, dtype):
    model = empty_model(open_checkpoint(folder), dtype)
    expected = load(folder, dtype="auto" if dtype is None else dtype)
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.dtype == expected.dtype


def test_the_default_dtype_is_put_back(folder):
    empty_model(open_checkpoint(folder), torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"])
def test_a_dtype_that_is_no_weights_is_refused(folder, dtype):
    with pytest.raises(ValueError, match=r"dtype: found .*, expected one of torch\.float16"):
        empty_model(open_checkpoint(folder), dtype)


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", [3]])
def test_no_architecture_is_refused(names):
    config = LlamaConfig()
    vars(config)["architectures"] = names
    with pytest.raises(ValueError, match=r"found architectures = .*, expected the name of a transformers class"):
        model_class(config)


@pytest.mark.parametrize("name", ["NoSuchModel", "pipeline", "models", "LlamaConfig", "AutoModel", "nn.Linear", ""])
def test_an_unknown_architecture_is_refused(folder, name):
    change_config(folder, architectures=[name])
    with pytest.raises(ValueError, match=f"found the architecture '{name}', expected a model of transformers"):
        empty_model(open_checkpoint(folder))


def test_custom_code_is_refused(folder):
    code = folder / "modeling_own.py"
    code.write_text("raise SystemExit('custom code was run')")
    change_config(folder, architectures=["OwnModel"], auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    with pytest.raises(ValueError, match=r"the architecture 'OwnModel'.*custom code \(auto_map\), which is not run"):
        empty_model(open_checkpoint(folder))
    change_config(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    with pytest.raises(ValueError, match=r"config\.json: transformers .* cannot read it"):
        empty_model(open_checkpoint(folder))


def test_custom_code_is_not_needed_where_transformers_has_the_model(folder):
    (folder / "modeling_own.py").write_text("raise SystemExit('custom code was run')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.M", "AutoConfig": "modeling_own.C"})
    assert type(empty_model(open_checkpoint(folder))) is LlamaForCausalLM


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_a_quantised_source_is_refused(folder, field):
    change_config(folder, **{field: {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ValueError, match=rf"quantised already \({field}, method 'gptq'\)"):
        empty_model(open_checkpoint(folder))


@pytest.mark.parametrize(
    "changes",
    [{"model_type": None}, {"model_type": "no-such-type"}, {"model_type": 3}, {"hidden_size": "wide"}],
)
def test_a_config_that_transformers_cannot_read_is_refused(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=r"config\.json: transformers .*cannot (read|build)"):
        empty_model(open_checkpoint(folder))


@pytest.mark.parametrize("changes", [{"hidden_size": 2**62}, {"vocab_size": -3}, {"num_attention_heads": 0}])
def test_a_config_of_no_model_is_refused(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=r"config\.json: transformers .*cannot (read|build)"):
        empty_model(open_checkpoint(folder))


def test_more_layers_than_tensors_are_refused_before_they_are_built(folder):
    change_config(folder, num_hidden_layers=1000)
    with pytest.raises(ValueError, match=r"config\.json: found num_hidden_layers = 1000, expected no more layers"):
        empty_model(open_checkpoint(folder))
