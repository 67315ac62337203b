"""PEFT's low_cpu_mem_usage: what is put on the meta device, and what must not be."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from small_models import coefficients, load, logits, randomize

import qsvft
from qsvft import QSVFTConfig

RESIDUAL = {"residual": True, "sides": "both", "rank": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def test_a_residual_base_is_made_with_its_values(llama, tmp_path):
    without = get_peft_model(load(llama), QSVFTConfig(**RESIDUAL), low_cpu_mem_usage=True)
    assert {name for name, tensor in without.state_dict().items() if tensor.is_meta} == set(coefficients(without))
    model = randomize(get_peft_model(load(llama), QSVFTConfig(**RESIDUAL)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k", "dense"])
@pytest.mark.parametrize("sides", ["one", "both"])
def test_an_adapter_without_values_has_the_names_shapes_and_dtypes_of_one_with_them(llama, pattern, sides):
    found = []
    for on_meta in (True, False):
        model = qsvft.quantize(load(llama), 4)
        config = QSVFTConfig(
            pattern=pattern, sides=sides, off_diagonals=2, rank=8, target_modules=["q_proj", "up_proj"]
        )
        inject_adapter_in_model(config, model, low_cpu_mem_usage=on_meta)
        tensors = get_peft_model_state_dict(model)
        assert any(tensor.is_meta for tensor in tensors.values()) is on_meta
        found.append({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    assert found[0] == found[1]
