"""PEFT's and transformers' auto classes and pipelines, given an adapter: on its base, held as it was trained."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from small_models import load, logits, randomize
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    pipeline,
)

import qsvft


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path / "cache"))


def test_autopeft_loads_an_adapter_on_its_base_as_it_was_held(llama, tmp_path):
    model = randomize(qsvft.from_pretrained(llama, rank=8, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(found), logits(model))
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    on = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", "mine", is_trainable=True, device_map="cpu")
    assert list(on.peft_config) == ["mine"] and sum(p.requires_grad for p in on.parameters()) == 14
    with pytest.raises(ValueError, match="expected one of a PeftModelForSequenceClassification"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_transformers_auto_classes_and_pipeline_load_an_adapter_on_its_base_as_it_was_held(llama, tmp_path):
    model = randomize(qsvft.from_pretrained(llama, rank=8, progress=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "adapter")
    by_pipeline = pipeline("text-generation", model=str(tmp_path / "adapter"), device="cpu")
    for found in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", adapter_name="mine"),
        LlamaForCausalLM.from_pretrained(tmp_path / "adapter", dtype="auto", device_map="cpu"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32),
        by_pipeline.model,
    ):
        assert isinstance(found, LlamaForCausalLM) and torch.equal(logits(found), logits(model))
        assert not found.training and not any(p.requires_grad for p in found.parameters())
        assert found.active_adapters() == list(found.peft_config)
        found.disable_adapters()
        assert not torch.equal(logits(found), logits(model))
        found.enable_adapters()
    assert len(by_pipeline("w2 w3", max_new_tokens=3, return_tensors=True)[0]["generated_token_ids"]) == 5
    with pytest.raises(ValueError, match=r"is an adapter of a LlamaForCausalLM; expected one of a LlamaModel"):
        AutoModel.from_pretrained(tmp_path / "adapter")


def test_transformers_takes_its_own_way_where_the_base_is_asked_for_otherwise(llama, tmp_path):
    qsvft.from_pretrained(llama, rank=8, progress=False).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit the base model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    held = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=settings)
    assert isinstance(held.model.layers[0].mlp.up_proj.base_layer, Linear4bit)


def test_autopeft_leaves_other_adapters_and_arguments_to_peft(llama, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(llama), config).save_pretrained(tmp_path / "lora")
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").peft_config["default"].peft_type == "LORA"
    qsvft.from_pretrained(llama, rank=8, progress=False).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit the base model"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=True)
