"""Which layers are linear, in whatever words, and which of them their parent computes itself."""

import logging

import bitsandbytes as bnb
import pytest
import torch
from small_models import load, randomize
from torch import nn
from torch.nn import functional as F
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import qsvft
from qsvft.storage.linear_layers import is_linear, is_other_linear, read_directly
from qsvft.tuner import QSVFTLinear

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(4, 16)[None]


class InOtherWords(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Inherits(nn.Linear):
    pass


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.topk(1).indices


class Scaled(nn.Linear):
    scale = 2.0

    def forward(self, x):
        return self.scale * super().forward(x)


class ScaledByABuffer(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        return self.scale * super().forward(x)


class Drops(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class Folded(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(0, 1))


class Raises(nn.Linear):
    def forward(self, x):
        raise RuntimeError("wants a mesh of devices")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, InOtherWords, Inherits])
def test_a_layer_is_linear_whatever_its_class_says_it_in(kind, bias):
    layer = kind(6, 4, bias)
    before = torch.get_rng_state()
    assert is_linear(layer) and not is_other_linear(layer)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        assert is_linear(kind(6, 4, bias))


@pytest.mark.parametrize("kind", [Router, Scaled, ScaledByABuffer, Drops, Folded, Raises])
def test_a_subclass_with_another_forward_is_left_as_it_is_and_refused_by_name(kind):
    torch.manual_seed(0)
    assert is_other_linear(kind(6, 4)) and not is_linear(kind(6, 4))
    model = nn.Sequential(nn.Linear(64, 64), kind(64, 64))
    with pytest.raises(TypeError, match=rf"1: cannot adapt a {kind.__name__}, whose forward .* exclude_modules"):
        qsvft.prepare(model, 4, target_modules=["1"], progress=False)
    model = qsvft.prepare(model, 4, progress=False).base_model.model
    assert isinstance(model[0], QSVFTLinear) and type(model[1]) is kind and model[1].weight.is_floating_point()


def test_other_layers_are_neither():
    for layer in (nn.Embedding(4, 4), bnb.nn.Linear4bit(4, 4, device="meta"), nn.Bilinear(2, 2, 2)):
        assert not is_linear(layer) and not is_other_linear(layer)
    assert is_linear(Conv1D(4, 6))


def test_a_model_of_such_layers_is_quantised_adapted_and_merged():
    torch.manual_seed(0)
    model = qsvft.prepare(FalconForCausalLM(FalconConfig(**SMALL)).bfloat16(), 4, progress=False)
    layers = [module for module in model.modules() if isinstance(module, QSVFTLinear)]
    assert len(layers) == 8 and all(isinstance(layer.base_layer, bnb.nn.Linear4bit) for layer in layers)
    randomize(model).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        merged = model.merge_and_unload()(input_ids=IDS).logits
    assert (merged - expected).norm() < 2e-2 * expected.norm()


class ReadsIt(nn.Module):
    """A parent of five layers, of which it reads three."""

    def __init__(self):
        super().__init__()
        self.called, self.sliced, self.read, self.passed, self.nested = (nn.Linear(64, 64) for _ in range(5))
        nn.init.zeros_(self.called.weight)

    def reset_parameters(self):
        nn.init.zeros_(self.called.weight)

    def forward(self, x):
        if isinstance(self.called.weight, torch.Tensor) and self.called.weight.dtype == torch.int8:
            x = x.to(self.called.weight.device)
        slices = self.sliced.weight[:, :2] if x.dim() == 9 else None
        x = self.called(self.sliced(x)) if slices is None else x
        x = x @ self.read.weight.T
        return self._more(F.linear(x, weight=self.passed.weight))

    def _more(self, x):
        return (lambda: x @ self.nested.weight)()


@pytest.mark.parametrize("bits", [4, 16])
def test_what_a_parent_reads_itself_is_left_as_it_is_and_refused_by_name(bits):
    torch.manual_seed(0)
    model = nn.Sequential(ReadsIt(), nn.Linear(64, 64))
    assert read_directly(model) == dict.fromkeys(("0.nested", "0.passed", "0.read"), "ReadsIt")
    with pytest.raises(ValueError, match=r"0\.read: ReadsIt reads this layer's weight itself.* exclude_modules"):
        qsvft.prepare(model, bits, target_modules=["read"], progress=False)
    model = randomize(qsvft.prepare(model, bits, progress=False))
    x = torch.randn(3, 64)
    found = model(x)
    found.sum().backward()
    trained = {name.split(".qsvft_M")[0][-6:]: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"called", "sliced", "odel.1"} and all(grad.any() for grad in trained.values())
    torch.testing.assert_close(model.merge_and_unload()(x), found.detach(), rtol=1e-3, atol=1e-3)


def test_a_model_whose_mixer_reads_its_layers_runs_in_4_bits():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 16}
    model = qsvft.prepare(MambaForCausalLM(MambaConfig(**sizes)), 4, progress=False, gradient_checkpointing=False)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)


def test_what_stays_dense_is_named_with_its_bytes_where_it_is_much(llama, caplog):
    caplog.set_level(logging.WARNING, logger="qsvft")
    # Experts that compute in their own way, and a router that is no linear layer to be quantised.
    config = Llama4TextConfig(**SMALL, num_key_value_heads=2, head_dim=16, intermediate_size=128, num_local_experts=4)
    qsvft.quantize(Llama4ForCausalLM(config).bfloat16(), 4, progress=False)
    (said,) = [record.getMessage() for record in caplog.records]
    numbers = 2 * 4 * 3 * 64 * 128  # layers, experts, matrices
    assert f"{(2 * numbers + 2 * 2 * 4 * 64) / 2**20:.2f} MiB" in said and "Llama4TextExperts" in said
    assert "model.layers.0.feed_forward.experts.gate_up_proj" in said
    caplog.clear()
    qsvft.quantize(load(llama), 4, progress=False)
    qsvft.quantize(load(llama), 4, skip_modules=["mlp"], progress=False)  # as asked for
    assert caplog.records == []


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_which_nothing_can_be_quantised_is_refused(bits):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), Router(8, 2))
    with pytest.raises(
        ValueError, match=r"Sequential: expected linear layers to quantise to . bits, found none .*Conv2d"
    ):
        qsvft.quantize(model, bits, progress=False)
    assert qsvft.quantize(model, 16) is model
