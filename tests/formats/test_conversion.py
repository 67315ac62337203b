"""``convert_to_lora`` and ``save_as_lora`` of a model in memory: what PEFT's own give, without its SVD of every dW."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from small_models import load, logits, randomize
from stored_models import gpt2
from transformers import AutoModelForSequenceClassification

import qsvft

FORMS = {"two-sided": {}, "one-sided": {"sides": "one"}, "banded": {"pattern": "banded", "rank": 12}}
FORMS["ranks"] = {"rank_pattern": {"q_proj": 12}}


def adapted(llama, **options):
    model = load(llama, torch.float32)
    return randomize(qsvft.prepare(model, **{"bits": 4, "rank": 8, "progress": False, **options}))


def products(tensors):
    """B A of each layer."""
    ends = ".lora_A.weight"
    names = [key.removesuffix(ends) for key in tensors if key.endswith(ends)]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}{ends}"] for name in names}


def on_base(llama, config, tensors):
    lora = get_peft_model(qsvft.quantize(load(llama, torch.float32), progress=False), config)
    loaded = set_peft_model_state_dict(lora, tensors)
    assert loaded.unexpected_keys == []
    return lora


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_same_model_and_nothing_is_taken_apart(llama, form, monkeypatch):
    model = adapted(llama, **FORMS[form])
    for name in ("svd", "eigh"):
        plain = getattr(torch.linalg, name)

        def small(matrix, *arguments, _=plain, **options):
            assert max(matrix.shape) <= 24, "a whole dW"
            return _(matrix, *arguments, **options)

        monkeypatch.setattr(torch.linalg, name, small)
    config, tensors = qsvft.convert_to_lora(model)
    assert config.r == config.lora_alpha == max(FORMS[form].get("rank", 8), 12 if form == "ranks" else 0)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    change = float((logits(model) - logits(qsvft.quantize(load(llama, torch.float32), progress=False))).abs().max())
    assert float((logits(on_base(llama, config, tensors)) - logits(model)).abs().max()) < 1e-4 * change


@pytest.mark.parametrize("rank", [3, 8, 0.5, 0.9, 1.0])
def test_it_is_what_pefts_own_conversion_gives(llama, rank):
    model = adapted(llama)
    config, tensors = qsvft.convert_to_lora(model, rank)
    theirs, expected = peft.convert_to_lora(model, rank=rank)
    assert tensors.keys() == expected.keys()
    ours, wanted = products(tensors), products(expected)
    assert all((ours[name] - one).norm() < 1e-4 * one.norm() for name, one in wanted.items())
    if rank != 1.0:  # there rounding decides
        assert {key: tensor.shape for key, tensor in tensors.items()} == {k: t.shape for k, t in expected.items()}
    assert config.base_model_name_or_path == theirs.base_model_name_or_path
    assert (logits(on_base(llama, config, tensors)) - logits(on_base(llama, theirs, expected))).norm() < 1e-3 * (
        logits(model).norm()
    )


def test_saved_it_loads_as_any_lora_and_its_card_says_how_far_off_it_is(llama, tmp_path):
    model = adapted(llama)
    qsvft.save_as_lora(tmp_path / "lora", model, rank=4)
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.r == 4 and config.target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    base = qsvft.quantize(load(llama, torch.float32), progress=False)
    lora = PeftModel.from_pretrained(base, tmp_path / "lora")
    written = on_base(llama, *qsvft.convert_to_lora(model, 4))
    assert torch.equal(logits(lora), logits(written))
    deltas = [m.get_delta_weight("default").double() for m in model.modules() if hasattr(m, "qsvft_M")]
    left = sum(float(torch.linalg.svdvals(one)[4:].square().sum()) for one in deltas)
    error = (left / sum(float(one.square().sum()) for one in deltas)) ** 0.5
    assert f"{error:.2%} off" in (tmp_path / "lora" / "README.md").read_text()


def test_it_is_what_exporting_the_saved_adapter_writes(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, progress=False)
    model = randomize(qsvft.from_pretrained(base, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    qsvft.save_as_lora(tmp_path / "memory", model)
    qsvft.export(tmp_path / "adapter", tmp_path / "files", dtype="float32", progress=False)
    memory, files = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("memory", "files"))
    assert memory.keys() == files.keys() and all(torch.equal(memory[key], files[key]) for key in files)
    configs = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("memory", "files")]
    assert configs[0] == configs[1]


def test_of_a_conv1d_it_is_the_same_model():
    model = randomize(qsvft.prepare(gpt2(torch.float32), 4, rank=8, progress=False), scale=2.0)
    config, tensors = qsvft.convert_to_lora(model)
    lora = get_peft_model(qsvft.quantize(gpt2(torch.float32), progress=False), config)
    set_peft_model_state_dict(lora, tensors)
    change = float((logits(model) - logits(qsvft.quantize(gpt2(torch.float32), progress=False))).abs().max())
    assert float((logits(lora) - logits(model)).abs().max()) < 1e-3 * change


def test_a_head_that_trains_whole_goes_along(llama):
    def classifier():
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3, dtype=torch.float32)

    model = randomize(qsvft.prepare(classifier(), rank=8, progress=False))
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    config, tensors = qsvft.convert_to_lora(model)
    lora = get_peft_model(qsvft.quantize(classifier(), skip_modules=["score"], progress=False), config)
    set_peft_model_state_dict(lora, tensors)
    assert (logits(lora) - logits(model)).norm() < 1e-4 * logits(model).norm()


def test_one_adapter_of_several_is_converted(llama):
    model = adapted(llama)
    model.add_adapter("other", qsvft.QSVFTConfig(rank=8, task_type="CAUSAL_LM"))
    randomize(model, "other", seed=7)
    expected = {m.module_name: m.get_delta_weight("other") for m in model.modules() if hasattr(m, "qsvft_M")}
    found = products(qsvft.convert_to_lora(model, adapter_name="other")[1])
    for name, one in expected.items():
        assert (found[f"base_model.model.{name}"] - one).norm() < 1e-5 * one.norm()


def test_onto_the_base_before_it_was_rounded_nothing_is_given_back(llama):
    batch = {"input_ids": torch.arange(4, 20).view(2, 8), "labels": torch.arange(4, 20).view(2, 8)}
    model = qsvft.prepare(load(llama), 4, calibration=[batch], rank=8, progress=False)
    held, original = (products(qsvft.convert_to_lora(model, onto=onto)[1]) for onto in ("held", "original"))
    assert all(one.norm() > 0 for one in held.values())
    assert all(one.norm() == 0 for one in original.values())  # M is zero still


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, 0.0, "8"])
def test_what_is_no_rank_is_refused(llama, rank):
    with pytest.raises(ValueError, match=r"convert_to_lora\(\): rank: expected a whole number"):
        qsvft.convert_to_lora(adapted(llama), rank)


def test_what_has_no_such_adapter_is_refused(llama):
    with pytest.raises(TypeError, match="LlamaForCausalLM: found no layer with an SVFT adapter named 'default'"):
        qsvft.convert_to_lora(load(llama))
    model = adapted(llama)
    with pytest.raises(TypeError, match="named 'other'"):
        qsvft.convert_to_lora(model, adapter_name="other")
    next(p for name, p in model.named_parameters() if "qsvft_M" in name).data[0] = torch.nan
    with pytest.raises(ValueError, match="holds 1 NaN or Inf"):
        qsvft.convert_to_lora(model)
