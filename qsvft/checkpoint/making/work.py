"""One unit of work: read, quantise, decompose, and the tensors that are written of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...storage.digests import tensor_bytes
from ...storage.factor_files import factor_tensors, length_tensors, residual_tensors
from ...storage.factors import make_bases, make_shared_basis, measured_scale
from ...storage.quantization import quantized_linear
from ...storage.residual import residual_linear
from ...storage.weights import check_weight, dense_weight
from ..source.checkpoint import Checkpoint
from ..source.names import read_piece
from .plan import Options, StoredForm, Unit


def finish_unit(
    unit: Unit, checkpoint: Checkpoint, model: PreTrainedModel, options: Options, device: torch.device
) -> tuple[dict[str, Tensor], str]:
    """Do a unit.

    Args:
        unit: what to do.
        checkpoint: where its tensors are.
        model: on the meta device; says which class a layer has.
        options: how the weights are held, and for which adapters they are decomposed.
        device: where matrices are decomposed. They are quantised on the CPU wherever that is, so that the weight, and
            with it the factors, do not depend on it; but for residuals, which are taken after the decomposition.

    Returns:
        The tensors to write, on the CPU, and the SHA-256 of what was read.

    Raises:
        ValueError: NaN or Inf in a weight, naming the module.
    """
    written = _read(unit, checkpoint, model)
    read, source = dict(written), tensors_digest(written)
    held: dict[str, nn.Module] = {}
    for described in unit.layers:
        name = described.name
        layer = _layer(model, name, read)
        check_weight(name, layer)
        if described.held == "quantised":
            layer = quantized_linear(layer, options.bits)
            written |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.state_dict().items()}
        held[name] = layer
    del read
    for stored in unit.stored:
        written |= _factors(stored, held, options, device)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in written.items()}, source


def dense_weights(unit: Unit, checkpoint: Checkpoint, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The names of a unit's linear layers with their weights (m, n), before they are quantised."""
    read = _read(unit, checkpoint, model)
    for described in unit.layers:
        yield described.name, _dense(_layer(model, described.name, read))


def source_digest(unit: Unit, checkpoint: Checkpoint, model: PreTrainedModel) -> str:
    """SHA-256 of what is read for a unit."""
    return tensors_digest(_read(unit, checkpoint, model))


def _read(unit: Unit, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    for piece in unit.pieces:
        read |= read_piece(checkpoint, piece, model)
    return {name: read[name] for name in unit.tensors}


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def _layer(model: PreTrainedModel, name: str, read: Mapping[str, Tensor]) -> nn.Module:
    """A dense layer with the weight that was read, of the class that it has in the model."""
    kind = type(model.get_submodule(name))
    new: Any = Conv1D(1, 1) if kind is Conv1D else nn.Linear(1, 1, bias=False, device="meta")
    weight, bias = read[f"{name}.weight"], read.get(f"{name}.bias")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    if kind is Conv1D:
        new.nx, new.nf = weight.shape
    else:
        new.out_features, new.in_features = weight.shape
    return cast(nn.Module, new)


def _factors(
    stored: StoredForm, held: Mapping[str, nn.Module], options: Options, device: torch.device
) -> dict[str, Tensor]:
    """The bases of a form and the lengths that its layers give to their directions."""
    rank, bits, form = stored.rank, options.config.factor_bits, stored.form
    if options.config.residual:
        return _residual(stored, held[stored.members[0]].to(device), options)
    weights = {name: _dense(held[name]).to(device) for name in stored.members}
    if form.group is not None:
        bases = {form.inward: make_shared_basis(weights.values, rank, bits, form.method)}
    else:
        (weight,) = weights.values()
        made = make_bases(weight, rank, "both" if form.kind == "both" else "one", bits, form.method)
        bases = {key: made[key.side] for key in form.keys}
    tensors: dict[str, Tensor] = {}
    for key, basis in bases.items():
        tensors |= factor_tensors(stored.owner, key, basis)
        if form.kind != "both":
            for name in stored.layers:
                tensors |= length_tensors(name, key, *measured_scale(weights[name], basis, key.side, rank))
    return tensors


def _dense(layer: nn.Module) -> Tensor:
    weight = dense_weight(layer)
    assert weight is not None
    return weight


def _residual(stored: StoredForm, layer: nn.Module, options: Options) -> dict[str, Tensor]:
    """R in NF4 in the weight's place, and the directions that are added to it."""
    name, form = stored.members[0], stored.form
    made = residual_linear(layer, stored.rank, options.config.factor_bits, form.method)
    tensors = {f"{name}.{leaf}": tensor for leaf, tensor in made.residual.state_dict().items()}
    for key in form.keys:
        tensors |= factor_tensors(name, key, made.basis(key.side))
    return tensors | residual_tensors(name, form.inward, made.qsvft_s)
