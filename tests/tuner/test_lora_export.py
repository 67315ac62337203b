"""PEFT's conversion to LoRA, which reads dW in the layout of the base's weight."""

import pytest
import torch
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from small_models import load, logits, randomize
from stored_models import gpt2
from transformers.pytorch_utils import Conv1D

import qsvft
from qsvft.tuner import QSVFTLinear

TARGETS = {"square Conv1D": ["attn.c_proj"], "wide Conv1D": ["c_attn"], "tall Conv1D": ["mlp.c_proj"]}


def converted(model, base):
    """LoRA's model on an equal base, at a rank that holds all of dW."""
    config, tensors = convert_to_lora(model, rank=8)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in base.modules())
    lora = get_peft_model(base, config)
    set_peft_model_state_dict(lora, tensors)
    return lora


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_of_a_conv1d_it_is_the_same_model(targets, bits):
    def base():
        return qsvft.quantize(gpt2(torch.float32), bits)

    model = randomize(qsvft.prepare(gpt2(torch.float32), bits, rank=8, target_modules=targets), scale=2.0)
    layer = next(module for module in model.modules() if isinstance(module, QSVFTLinear))
    if bits == 16:
        assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape
    lora = converted(model, base())
    change = float((logits(model) - logits(base())).abs().max())
    assert change > 1e-2
    assert float((logits(lora) - logits(model)).abs().max()) < 1e-3 * change


@pytest.mark.parametrize("form", [{}, {"sides": "one"}], ids=str)
def test_of_a_linear_layer_it_is_the_same_model(llama, form):
    model = randomize(qsvft.prepare(load(llama, torch.float32), 4, rank=8, pattern="dense", **form))
    lora = converted(model, qsvft.quantize(load(llama, torch.float32), 4))
    change = float((logits(model) - logits(qsvft.quantize(load(llama, torch.float32), 4))).abs().max())
    assert float((logits(lora) - logits(model)).abs().max()) < 1e-3 * change
