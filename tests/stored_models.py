"""Models whose factors are stored: prepared directories made by hand, and what stands in for another machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import load
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import qsvft
from qsvft.checkpoint.prepared.check import open_prepared
from qsvft.maths import decomposition
from qsvft.storage.factor_files import FactorFiles, factor_tensors, length_tensors
from qsvft.storage.factors import measured_scale
from qsvft.storage.tensor_writer import write_tensors
from qsvft.tuner import QSVFTLinear


def gpt2(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A GPT-2 of one layer: Conv1D weights, oblong both ways, with biases."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=48, n_layer=1, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).to(dtype)


def layers(model: nn.Module) -> dict[str, QSVFTLinear]:
    """The adapted layers by their names in the model without adapters."""
    return {m.module_name: m for m in model.modules() if isinstance(m, QSVFTLinear)}


def named_factors(model: nn.Module) -> dict[str, Tensor]:
    """The bases that the adapters of a model hold and the lengths that go with them, by their names."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers(model).items():
        for form in layer.forms.values():
            for key in form.keys:
                tensors |= factor_tensors(name, key, layer.basis(key))
            if form.kind != "both":
                basis, side = layer.basis(form.inward), form.inward[0]
                tensors |= length_tensors(
                    name, form.inward, *measured_scale(layer.original_weight(), basis, side, basis.rank)
                )
    return tensors


def factors_in(folder: Path) -> FactorFiles:
    """Those of a directory."""
    return FactorFiles(open_prepared(folder).files.paths)


def write(folder: Path, base: nn.Module, factors: dict[str, Tensor]) -> Path:
    """A directory as a preparation leaves it: weights as they are held, and factors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.clone().contiguous() for name, value in base.state_dict().items()}
    write_tensors(state | factors, folder / "model.safetensors", {"format": "pt"})
    return folder


def prepared_llama(folder: Path, llama: Path, bits: int = 4, **options) -> Path:
    """The small Llama, prepared for adapters of these options."""
    factors = named_factors(qsvft.prepare(load(llama), bits=bits, progress=False, **options))
    return write(folder, qsvft.quantize(load(llama), bits, progress=False), factors)


def forbid_decomposing(patch: pytest.MonkeyPatch) -> None:
    """From now on nothing may be decomposed, nor lengths be measured."""

    def refuse(*_, **__):
        raise AssertionError("decomposed")

    for name in ("eigh", "svd", "qr", "svdvals", "eig"):
        patch.setattr(torch.linalg, name, refuse)
    patch.setattr("qsvft.tuner.layer.measured_scale", refuse)


def turn_signs(patch: pytest.MonkeyPatch) -> None:
    """From now on every second singular vector comes out with the other sign, as it might on another machine."""
    rule = decomposition._signs

    def turned(vectors: Tensor) -> Tensor:
        signs = rule(vectors)
        signs[1::2] *= -1
        return signs

    patch.setattr(decomposition, "_signs", turned)
