"""torch.compile with Inductor, which leaves out roundings between operations: factors stay the same numbers."""

import shutil

import pytest
import torch
from peft import get_peft_model
from small_models import load, tokens
from torch import nn

import qsvft
from qsvft import QSVFTConfig

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a C++ compiler"
)
FORMS = {
    "int8": {"factor_bits": 8},
    "NF4": {"factor_bits": 4},
    "one-sided NF4": {"factor_bits": 4, "sides": "one", "pattern": "banded", "off_diagonals": 2},
}


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(96, 64)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_layer_is_the_same_map_and_has_the_same_gradient(form):
    torch.manual_seed(0)
    model = get_peft_model(One(), QSVFTConfig(target_modules=["layer"], **FORMS[form]))
    layer, x, g = model.base_model.model.layer, torch.randn(16, 96), torch.randn(16, 64)
    layer.M("default").data.normal_()
    base, found = layer.get_base_layer()(x).detach(), []
    for run in (model, torch.compile(model)):
        y = run(x)
        (gradient,) = torch.autograd.grad(y, layer.M("default"), g)
        found.append((y.detach() - base, gradient))
    for eager, compiled in zip(*found, strict=True):
        assert float((compiled - eager).norm()) <= 1e-5 * float(eager.norm())


@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_embedding_in_few_bits_has_the_same_rows(bits, llama):
    model = qsvft.vocabulary.quantize_embeddings(load(llama, torch.float32), bits)
    embedding, ids = model.get_input_embeddings(), tokens()
    with torch.inference_mode():
        assert torch.equal(torch.compile(embedding)(ids), embedding(ids))
