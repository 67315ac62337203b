"""``use_factors``: the factors of a prepared directory for a model that is in memory already."""

from __future__ import annotations

import os
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .checkpoint.prepared.check import open_prepared
from .checkpoint.prepared.record import read_record, recorded_fields
from .storage.factor_files import FactorFiles
from .storage.tensor_files import TensorFiles
from .storage.weights import check_weight, dense_weight

TOLERANCE = 1e-2
"""How much a weight may differ from the one that the factors are of, relative to its Frobenius norm."""


def use_factors(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Let adapters that are attached to a model from now on take their factors from a prepared directory.

    What is stored there is not decomposed, and an adapter trained on these factors fits, however they would come out
    here. Every layer's weight is compared with that in the directory.

    Args:
        model: quantised as the directory is (or not at all, if it holds 16 bits), without adapters.
        directory: what :func:`qsvft.prepare_checkpoint` wrote.

    Raises:
        ValueError: the model carries adapters; a layer's weight differs by more than 1e-2 from that in the directory,
            or is not there; the directory holds no factors, those of residual bases, or those of an option that this
            version does not have.
        FileNotFoundError: no checkpoint in the directory.
    """
    adapted = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None:
        raise ValueError(
            f"{adapted}: the model carries adapters already; expected one without any. Call use_factors() before "
            "prepare(), get_peft_model() or PeftModel.from_pretrained()."
        )
    recorded_fields((read_record(directory) or {}).get("adapter") or {}, os.fspath(directory))
    prepared = open_prepared(directory)
    prepared.check()
    tensors = prepared.files
    factors = FactorFiles(tensors.paths)
    if not factors:
        raise ValueError(
            f"{directory}: found no factors among its {len(tensors.paths)} tensors; expected a prepared directory. "
            "Make one with qsvft.prepare_checkpoint(source, target)."
        )
    if (residual := next(factors.residuals(), None)) is not None:
        raise ValueError(
            f"{residual[0]}: {directory} was prepared with residual=True, so that its weights are what the factors "
            "leave; expected those of the model. Load the model from it: qsvft.from_pretrained(directory)."
        )
    modules = dict(model.named_modules())
    layers = dict.fromkeys(name.layer for name in factors)
    if (missing := next((name for name in layers if name not in modules), None)) is not None:
        raise ValueError(
            f"{missing}: {directory} holds factors for this layer, {type(model).__name__} has no such module. Expected "
            "the directory of the same model: prepare this one, or load the model from the directory."
        )
    for name in layers:
        _compare(name, modules[name], tensors, directory)
    holder: Any = model
    holder.qsvft_factors = factors


def _compare(name: str, layer: nn.Module, tensors: TensorFiles, directory: object) -> None:
    """Refuse a layer whose weight is not the one in the directory."""
    check_weight(name, layer)
    stored, held = _stored_weight(name, layer, tensors), dense_weight(layer)
    if stored is None or held is None or stored.shape != held.shape:
        shapes = ["none" if weight is None else f"shape {tuple(weight.shape)}" for weight in (held, stored)]
        found = f"found {shapes[0]} here ({type(layer).__name__}) and {shapes[1]} there"
    else:
        held, stored = held.float(), stored.to(held.device, torch.float32)
        difference = float(torch.linalg.matrix_norm(held - stored) / torch.linalg.matrix_norm(stored))
        if difference <= TOLERANCE or torch.equal(held, stored):
            return
        found = f"they differ by {difference:.3g}, expected at most {TOLERANCE}"
    raise ValueError(
        f"{name}: the factors in {directory} belong to another weight than the model's: {found}. Load the model from "
        "the directory, or quantise the checkpoint that it was prepared from in the same way."
    )


def _stored_weight(name: str, layer: nn.Module, tensors: TensorFiles) -> Tensor | None:
    """A layer's weight (m, n) as a prepared directory stores it, dense; None if it is not there."""
    leaf = f"{name}.weight"
    if leaf not in tensors.paths:
        return None
    weight = tensors.read(leaf)
    state = {key.removeprefix(f"{name}."): tensors.read(key) for key in tensors.paths if key.startswith(f"{leaf}.")}
    if state:
        return _dequantized(leaf, weight, state, tensors.paths[leaf])
    if f"{name}.SCB" in tensors.paths:
        return weight.float() * (tensors.read(f"{name}.SCB").float().view(-1, 1) / 127.0)
    turned = isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D
    return weight.t() if turned else weight


def _dequantized(name: str, weight: Tensor, state: dict[str, Any], path: str) -> Tensor:
    try:
        dense: Tensor = bnb.functional.dequantize_4bit(weight, QuantState.from_dict(state, weight.device))
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot dequantise {name} ({error!r}); expected 4-bit codes with their quantisation state. The "
            "file is damaged: copy it again, or prepare the checkpoint again."
        ) from error
    return dense
