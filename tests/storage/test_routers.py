"""What chooses experts, and gates with one output, are neither quantised nor adapted unless they are named."""

import pytest
import torch
from torch import nn
from transformers import (
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import qsvft
from qsvft.storage.routers import routers

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}


def switch():
    sizes = {"vocab_size": 96, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_experts": 4}
    layers = {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1}
    return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes, **layers))


def qwen():
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **sizes))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {})()
        self.config.num_experts = 4
        self.router = nn.ModuleDict({"layer": nn.Linear(64, 4)})
        self.gate, self.wide_gate = nn.Linear(64, 4), nn.Linear(64, 8)
        self.gate_proj, self.v_proj = nn.Linear(64, 4), nn.Linear(64, 4)
        self.one, self.conv = nn.Linear(64, 1), Conv1D(1, 64)

    def forward(self, x):
        return sum(layer(x).sum() for layer in (self.gate_proj, self.v_proj, self.gate))


def test_they_are_known_by_their_names_and_as_many_outputs_as_experts_or_by_one_output():
    assert routers(Gated()) == {"router.layer", "gate", "one", "conv"}
    assert routers(qwen()) == {f"model.layers.{layer}.mlp.shared_expert_gate" for layer in (0, 1)}
    parts = ("encoder.block.1.layer.1", "decoder.block.1.layer.2")
    assert routers(switch()) == {f"{part}.mlp.router.classifier" for part in parts}
    assert routers(nn.Sequential(nn.Linear(4, 4))) == set()


@pytest.mark.parametrize(("make", "chooses"), [(switch, "router.classifier"), (qwen, "shared_expert_gate")])
def test_they_stay_dense_and_are_adapted_where_they_are_named(make, chooses):
    torch.manual_seed(0)
    model = qsvft.prepare(make().bfloat16(), 4, rank=8, progress=False)
    layers = [layer for name, layer in model.named_modules() if name.endswith(chooses)]
    assert layers and {type(layer) for layer in layers} == {nn.Linear}
    leaf = chooses.rpartition(".")[2]
    model = qsvft.prepare(make().bfloat16(), 4, target_modules=[leaf], progress=False)
    adapted = [name for name, module in model.named_modules() if type(module).__name__ == "QSVFTLinear"]
    assert any(name.endswith(leaf) for name in adapted)
