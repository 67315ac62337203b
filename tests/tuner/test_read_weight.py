"""Who reads an adapted layer's weight and multiplies with it passes over the adapter: refused by name."""

import pytest
import torch
import torch.nn.functional as F
from small_models import load, logits, randomize, tokens
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import qsvft
from qsvft.tuner import QSVFTLinear


class Parent(nn.Module):
    """Reads its layer in a way that is told to it."""

    def __init__(self, read):
        super().__init__()
        self.read, self.layers = read, nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, x):
        (layer,) = self.layers
        return self.read(x, layer)


WAYS = {
    "linear": lambda x, layer: F.linear(x, layer.weight, layer.bias),
    "by keyword": lambda x, layer: F.linear(x, weight=layer.weight),
    "matmul": lambda x, layer: x @ layer.weight.T,
    "from the left": lambda x, layer: (layer.weight @ x.mT).mT,
    "in another dtype": lambda x, layer: torch.einsum("ti,oi->to", x, layer.weight.to(torch.float32).contiguous()),
    "a slice": lambda x, layer: F.linear(x, layer.weight[:3]),
    "a part of several": lambda x, layer: F.linear(x, layer.weight.chunk(2)[1]),
    "added": lambda x, layer: torch.addmm(layer.bias, x, layer.weight.t()),
}


def prepared(read):
    torch.manual_seed(0)
    return randomize(qsvft.prepare(Parent(read), bits=16, progress=False))


@pytest.mark.parametrize("way", WAYS)
def test_a_product_with_it_is_refused_by_name_and_allowed_where_no_adapter_acts(way):
    model, x = prepared(WAYS[way]), torch.randn(5, 64)
    with pytest.raises(ValueError, match=r"layers\.0: its weight is read and multiplied with .* exclude_modules"):
        model(x)
    with model.disable_adapter():
        base = model(x)
    merged = prepared(WAYS[way])
    merged.merge_adapter()
    W = merged.base_model.model.layers[0].get_base_layer().weight
    assert not torch.allclose(merged(x), base) and type(merged.base_model.model.layers[0].weight) is type(W)


def test_what_asks_looks_and_compares_works_as_ever(llama):
    model = randomize(qsvft.prepare(load(llama), 16, progress=False))
    layer = next(m for m in model.modules() if isinstance(m, QSVFTLinear))
    held, weight = layer.get_base_layer().weight, layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (held.dtype, held.device, held.shape)
    assert weight.data_ptr() == held.data_ptr() and torch.equal(weight, held) and (weight - held).norm() == 0
    assert isinstance(weight, torch.Tensor) and weight.float().abs().max() == held.float().abs().max()
    assert torch.equal(torch.aminmax(weight).max, held.max()) and bool(torch.isfinite(torch.aminmax(weight).min))
    with torch.no_grad():
        weight[0, 0] = 3.0
    assert held[0, 0] == 3.0


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_second_adapter_is_attached_beside_the_first(llama, bits):
    model = qsvft.prepare(load(llama), bits, progress=False)
    expected = logits(randomize(model))
    model.add_adapter("b", qsvft.QSVFTConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), expected)
    model.set_adapter("b")
    assert not torch.equal(logits(model), expected)


def test_a_model_that_asks_for_the_dtype_of_a_layer_trains():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    model = qsvft.prepare(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), 16, progress=False)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_torchs_own_fused_layer_does_not_pass_over_the_adapter():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, batch_first=True).eval()
    model, x = randomize(qsvft.prepare(model, bits=16, progress=False)).eval(), torch.randn(2, 5, 32)
    expected = model(x)
    with torch.inference_mode():
        assert torch.allclose(model(x), expected, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(x), expected, atol=1e-2)
