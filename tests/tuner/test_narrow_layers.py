"""A layer with few directions in a model of wider ones: a band that it cannot hold is all of its M."""

import pytest
import torch
from torch import nn

import qsvft
from qsvft.tuner.targets import logger


class Gated(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layer, self.gate = nn.Linear(48, 48), nn.Linear(48, outputs)

    def forward(self, x):
        y = self.layer(x)
        return y * torch.sigmoid(self.gate(y)).mean(-1, keepdim=True)


@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("pattern", ["banded", "random", "top_k"])
@pytest.mark.parametrize("outputs", [1, 5])
def test_its_M_is_whole_trains_and_merges(pattern, sides, outputs):
    torch.manual_seed(0)
    both = ["layer", "gate"]  # a gate with one output is adapted where it is named
    model = qsvft.prepare(Gated(outputs), 16, pattern=pattern, sides=sides, target_modules=both, progress=False)
    layer = model.base_model.model.gate
    assert layer.M("default").numel() == outputs**2
    assert model.base_model.model.layer.M("default").numel() == 48 * 17 - 72
    x = torch.randn(3, 48)
    model(x).sum().backward()
    assert layer.M("default").grad.all()
    with torch.no_grad():
        layer.M("default").normal_()
        expected = model(x)
        assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-4)


def test_it_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    qsvft.prepare(Gated(3), bits=16, pattern="banded", off_diagonals=4, progress=False)
    message = "off_diagonals=4 is cut to k - 1, which is all of M, in 1 of 2 layers, which have fewer directions: gate "
    assert set(said) == {f"{message}(k = 3)"}
    said.clear()
    qsvft.prepare(Gated(3), bits=16, progress=False)
    assert not said


def test_a_band_that_no_layer_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"layer: off_diagonals=48 needs a rank above it, found rank 48, the highest"):
        qsvft.prepare(Gated(1), bits=16, pattern="banded", off_diagonals=48, progress=False)
