"""MLPs in tiles over tokens: the same map and gradients, less at a time, and no product more under checkpointing."""

import copy
import pickle

import pytest
import torch
from small_models import VOCABULARY, load, randomize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import qsvft
from qsvft.lean import by_tiles
from qsvft.lean.tiles import tile_mlps, whole_mlps
from qsvft.tuner import QSVFTLinear

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=4)


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    monkeypatch.setattr(by_tiles, "TOKENS", 8)


def mlp(dtype=torch.float64):
    return nn.Sequential(LlamaMLP(CONFIG).to(dtype))


def gradients(model, x, g):
    leaf = x.clone().requires_grad_()
    y = model(leaf * 1)
    wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, g)]


@pytest.mark.parametrize("shape", [(1, 29, 16), (3, 11, 16), (29, 16), (2, 3, 5, 16), (1, 8, 16)])
def test_output_and_all_gradients_are_those_of_the_whole(shape):
    whole, x, g = mlp(), torch.randn(shape).double(), torch.randn(shape).double()
    tiled = tile_mlps(copy.deepcopy(whole))
    for found, expected in zip(gradients(tiled, x, g), gradients(whole, x, g), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_parameter_used_twice_gets_its_gradient_once_for_each_use():
    whole = mlp()
    whole[0].up_proj.weight = whole[0].gate_proj.weight
    x, g = torch.randn(1, 20, 16).double(), torch.randn(1, 20, 16).double()
    for found, expected in zip(gradients(tile_mlps(copy.deepcopy(whole)), x, g), gradients(whole, x, g), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_it_is_differentiable_twice():
    def curvature(model):
        leaf = torch.linspace(-1, 2, 320).double().view(1, 20, 16).requires_grad_()
        (first,) = torch.autograd.grad(model(leaf * 1).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    whole = mlp()
    expected = curvature(whole)
    torch.testing.assert_close(curvature(tile_mlps(copy.deepcopy(whole))), expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 0


def test_under_autocast_the_backward_computes_under_it_too():
    model, dtypes = tile_mlps(mlp(torch.float32)), []
    model[0].up_proj.register_forward_hook(lambda _module, _args, y: dtypes.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(1, 20, 16, requires_grad=True) * 1)
    y.sum().backward()
    assert dtypes == [torch.bfloat16] * 6


def model_and_batch(llama, **options):
    torch.manual_seed(0)
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, rank=8, progress=False, **options)).train()
    ids = torch.randint(4, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def step(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_prepared_model_learns_the_same(llama, checkpointing):
    model, batch = model_and_batch(llama, tile_mlp=True, gradient_checkpointing=checkpointing)
    assert "tile" in type(model.get_base_model().model.layers[0].mlp).forward.__code__.co_filename
    tiled = step(model, batch)
    whole_mlps(model)
    expected = step(model, batch)
    assert len(tiled) == len(expected) == sum(isinstance(m, QSVFTLinear) for m in model.modules())
    for name, gradient in expected.items():
        torch.testing.assert_close(tiled[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def test_a_checkpointed_layer_takes_no_product_more(llama):
    model, batch = model_and_batch(llama, tile_mlp=True)
    counts = []
    for change in (lambda m: m, whole_mlps):
        change(model)
        with FlopCounterMode(display=False) as counter:
            step(model, batch)
        counts.append(counter.get_total_flops())
    tiled, whole = counts
    assert 0 < tiled <= whole


class Largest(TorchDispatchMode):
    """The most numbers that one operation gave in a backward, as wide as an MLP is inside."""

    def __init__(self, width):
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 3 and out.shape[-1] == self.width:
            self.most = max(self.most, out.numel() // self.width)
        return out


@pytest.mark.parametrize(("tiled", "rows"), [(True, 8), (False, 60)])
def test_inside_of_it_no_more_than_a_tile_stands_at_once(llama, tiled, rows):
    model, batch = model_and_batch(llama, tile_mlp=tiled)
    inner = model.get_base_model().config.intermediate_size
    loss = model(**batch).loss
    with Largest(inner) as largest:
        loss.backward()
    assert largest.most == rows


def test_parameters_that_are_views_of_others_as_under_fsdp1_are_refused():
    model = tile_mlps(mlp())
    weight = model[0].up_proj.weight
    del model[0].up_proj.weight
    model[0].up_proj.weight = weight * 1
    with pytest.raises(RuntimeError, match=r"LlamaMLP: tile_mlp found parameters that FSDP1.*fsdp_version: 2"):
        model(torch.randn(1, 20, 16).double().requires_grad_() * 1)


def test_with_dropout_in_it_an_mlp_stays_whole():
    class DroppingMLP(LlamaMLP):
        def __init__(self):
            super().__init__(CONFIG)
            self.dropout, self.lengths = nn.Dropout(0.5), []

        def forward(self, x):
            self.lengths.append(x.shape[-2])
            return self.dropout(super().forward(x))

    model, x = tile_mlps(nn.Sequential(DroppingMLP())), torch.randn(1, 20, 16, requires_grad=True)
    model(x * 1)
    assert model[0].lengths == [20]
    model.eval()(x * 1)
    assert model[0].lengths[1:] == [8, 8, 4]


def test_it_copies_pickles_and_is_undone():
    model = tile_mlps(mlp())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0]) is not LlamaMLP
    assert type(whole_mlps(model)[0]) is LlamaMLP


def test_merging_gives_the_plain_class_back(llama):
    model, _ = model_and_batch(llama, tile_mlp=True)
    assert type(model.merge_and_unload().model.layers[0].mlp) is LlamaMLP


def test_a_model_without_such_mlps_is_refused():
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match=r"BertModel: found no MLP.*Leave tile_mlp off"):
        tile_mlps(bert)
