"""Biases that train beside M: saved with the adapter, bound to it, and its alone."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import load, logits, save_llama, tokens

import qsvft

BOTH = pytest.mark.parametrize("bias", ["qsvft_only", "all"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_llama(tmp_path_factory.mktemp("llama"), attention_bias=True, mlp_bias=True)
    model = load(path)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


def trained(folder, **options):
    model = qsvft.prepare(load(folder), bits=4, rank=8, progress=False, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def biases(model):
    return {
        n.replace("base_layer.", "").split("model.model.")[-1]: p for n, p in model.named_parameters() if "bias" in n
    }


@BOTH
def test_biases_that_were_asked_for_train_and_are_saved_loaded_and_merged(folder, tmp_path, bias):
    model = trained(folder, bias=bias, target_modules=["q_proj", "down_proj"])
    before, after = biases(load(folder)), biases(model)
    moved = {name for name in before if not torch.equal(before[name].bfloat16(), after[name].bfloat16())}
    assert {name.split(".")[-2] for name in moved} >= {"q_proj", "down_proj"}
    assert any(".o_proj." in name for name in moved) == (bias == "all")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qsvft.quantize(load(folder), 4, progress=False), tmp_path)
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    assert {name for name, p in biases(merged).items() if torch.equal(p, after[name])} == set(before)
    assert float((logits(merged) - expected).norm()) < 0.05 * float(expected.norm())


@BOTH
def test_a_bias_in_the_file_that_was_changed_left_out_or_not_asked_for_is_refused(folder, tmp_path, bias):
    trained(folder, bias=bias).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    key = next(name for name in whole if name.endswith("q_proj.base_layer.bias"))
    for changed in ({**whole, key: whole[key] + 1}, {name: t for name, t in whole.items() if name != key}):
        save_file(changed, file)
        with pytest.raises(ValueError, match="common digest"):
            PeftModel.from_pretrained(load_quantized(folder), tmp_path)
    save_file(whole, file)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace(f'"bias": "{bias}"', '"bias": "none"'))
    with pytest.raises(ValueError, match="a tensor of the base with other values"):
        PeftModel.from_pretrained(load_quantized(folder), tmp_path)


def load_quantized(folder):
    return qsvft.quantize(load(folder), 4, progress=False)


def test_an_adapter_that_trains_biases_is_the_only_one_of_its_model_and_of_all_rows(folder):
    model = trained(folder, bias="qsvft_only")
    plain = qsvft.QSVFTConfig(rank=8, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="'default' trains biases of the base"):
        model.add_adapter("second", plain)
    with pytest.raises(ValueError, match="changed the base's biases"):
        model(input_ids=tokens(), adapter_names=["__base__"] * len(tokens()))
    other = qsvft.prepare(load(folder), bits=4, rank=8, progress=False)
    with pytest.raises(ValueError, match="'second' trains biases of the base"):
        other.add_adapter("second", qsvft.QSVFTConfig(rank=8, bias="all", task_type="CAUSAL_LM"))
    assert list(other.peft_config) == ["default"]
