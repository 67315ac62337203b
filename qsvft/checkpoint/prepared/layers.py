"""Single layers of a prepared directory, read without the rest of it."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...storage.basis_key import BasisKey
from ...storage.experts import expert_parameters, split_experts
from ...storage.factor_files import FactorFiles
from ...storage.layer_as_stored import layer_as_stored
from ...storage.residual import ResidualLinear
from ...tuner.config import QSVFTConfig
from ...tuner.form import form_of
from .check import STATE, Prepared


def split_as_held(prepared: Prepared, model: PreTrainedModel) -> None:
    """Let linear layers stand for experts where the directory has them."""
    held = {
        name
        for name, module in model.named_modules()
        for leaf in expert_parameters(module)
        if any(f"{one}.{leaf}.0.weight" in prepared.entries for one in names_in_files(model, name))
    }
    split_experts(model, only=held)


def names_in_files(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """What a module may be called in a directory: its name, with the prefix of the base model or without it."""
    prefix = f"{model.base_model_prefix}."
    return name, f"{prefix}{name}", name.removeprefix(prefix)


def read_layer(
    prepared: Prepared, name: str, plain: nn.Module, dtype: torch.dtype, adapter: QSVFTConfig, factors: FactorFiles
) -> nn.Module:
    """A linear layer as transformers would load it from a prepared directory, on the CPU.

    Args:
        prepared: the directory.
        name: the layer's, as the directory has it.
        plain: a linear layer or Conv1D, which may be on the meta device: which of them it is.
        dtype: that its weight had before it was quantised.
        adapter: what the directory was prepared for.
        factors: its factors.

    Raises:
        ValueError: the directory has no such layer.
    """
    weight, bias = f"{name}.weight", f"{name}.bias"
    if weight not in prepared.entries:
        raise ValueError(
            f"{prepared.folder}: found no {weight} in it, expected each layer that the adapter has. Give the base that "
            "the adapter was trained on."
        )
    layer = _layer(prepared, name, plain, dtype)
    if bias in prepared.entries:
        layer.bias = nn.Parameter(prepared.files.read(bias), requires_grad=False)
    for residual, key, rank in factors.residuals():
        if residual == name:
            return with_directions(layer, name, key, rank, factors, adapter)
    return layer


def _layer(prepared: Prepared, name: str, plain: nn.Module, dtype: torch.dtype) -> Any:
    weight, read = f"{name}.weight", prepared.files.read
    shape = prepared.quantised_shape(name)
    if shape is None:
        return layer_as_stored(read(weight), conv=isinstance(plain, Conv1D))
    m, n = shape
    new: Any
    if weight + STATE not in prepared.entries:
        new = bnb.nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = bnb.nn.Int8Params(read(weight), requires_grad=False, CB=read(weight), SCB=read(f"{name}.SCB"))
    else:
        parts = {key.removeprefix(f"{weight}."): read(key) for key in prepared.entries if key.startswith(f"{weight}.")}
        new = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        new.weight = bnb.nn.Params4bit.from_prequantized(read(weight), parts, requires_grad=False, device="cpu")
        new.quant_state, new.support_avx512bf16_for_cpu = new.weight.quant_state, False
    new.source_cls, new.qsvft_dtype = type(plain), dtype
    return new


def with_directions(
    layer: Any, name: str, key: BasisKey, rank: int, files: FactorFiles, adapter: QSVFTConfig
) -> ResidualLinear:
    """A quantised residual with the singular directions beside it.

    Args:
        layer: quantised.
        name: its name in the directory.
        key, rank: of its directions, as :meth:`FactorFiles.residuals` names them.
        files: of the directory.
        adapter: what it was prepared for.

    Raises:
        ValueError: a basis is not there.
    """
    form, device = form_of(adapter, (layer.out_features, layer.in_features), rank), layer.weight.device
    V = files.basis(name, form.inward, rank, layer.in_features, device)
    U = files.basis(name, form.outward, rank, layer.out_features, device)
    if U is None or V is None:
        raise ValueError(
            f"{name}: its weight is a residual, and the directions beside it ({form.inward}, {form.outward}) "
            "are not stored; expected both. The directory is incomplete: copy it again, or prepare the checkpoint "
            "again."
        )
    return ResidualLinear(layer, U, V, files.residual_lengths(name, key, rank, device), form.method)
