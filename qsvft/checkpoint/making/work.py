"""One unit of work: read, quantise, decompose, and the tensors that are written of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...storage.digests import tensor_bytes
from ...storage.factor_files import factor_tensors, length_tensors, residual_tensors
from ...storage.factors import make_bases, measured_scale
from ...storage.layer_as_stored import layer_as_stored
from ...storage.quantization import quantized_linear
from ...storage.residual import residual_linear
from ...storage.weights import check_tensors, check_weight, dense_weight
from ..source.checkpoint import Checkpoint
from ..source.names import read_piece
from .plan import LinearLayer, Options, StoredForm, Unit


def finish_unit(
    unit: Unit, checkpoint: Checkpoint, model: PreTrainedModel, options: Options, device: torch.device
) -> tuple[dict[str, Tensor], str]:
    """Do a unit.

    Args:
        unit: what to do.
        checkpoint: where its tensors are.
        model: on the meta device, as its class makes it.
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
    others = {f"{unit.layer.name}.bias"} if unit.layer is not None else dict(model.named_parameters()).keys()
    check_tensors((name, tensor) for name, tensor in written.items() if name in others)
    if unit.layer is not None:
        name = unit.layer.name
        layer = _layer(unit.layer, read)
        del read
        check_weight(name, layer)
        if unit.layer.held == "quantised":
            layer = quantized_linear(layer, options.bits)
            written |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.state_dict().items()}
        if unit.stored is not None:
            written |= _factors(unit.stored, layer, options, device)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in written.items()}, source


def weight_of(unit: Unit, checkpoint: Checkpoint, model: PreTrainedModel) -> Tensor:
    """The weight (m, n) of a unit's linear layer, before it is quantised."""
    assert unit.layer is not None
    weight = dense_weight(_layer(unit.layer, _read(unit, checkpoint, model)))
    assert weight is not None
    return weight


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


def _layer(linear: LinearLayer, read: Mapping[str, Tensor]) -> nn.Module:
    """A dense layer with the weight that was read, of the class that it has in the model."""
    return layer_as_stored(read[f"{linear.name}.weight"], read.get(f"{linear.name}.bias"), linear.conv)


def _factors(stored: StoredForm, layer: nn.Module, options: Options, device: torch.device) -> dict[str, Tensor]:
    """The bases of a form and the lengths that its layer gives to their directions."""
    name, rank, form = stored.layer, stored.rank, stored.form
    if options.config.residual:
        return _residual(stored, layer.to(device), options)
    weight = dense_weight(layer)
    assert weight is not None
    weight = weight.to(device)
    made = make_bases(weight, rank, "both" if form.kind == "both" else "one", options.config.stored_bits, form.method)
    tensors: dict[str, Tensor] = {}
    for key in form.keys:
        basis = made[key.side]
        tensors |= factor_tensors(name, key, basis)
        if form.kind != "both":
            tensors |= length_tensors(name, key, *measured_scale(weight, basis, key.side, rank))
    return tensors


def _residual(stored: StoredForm, layer: nn.Module, options: Options) -> dict[str, Tensor]:
    """R in NF4 in the weight's place, and the directions that are added to it."""
    name, form = stored.layer, stored.form
    made = residual_linear(layer, stored.rank, options.config.stored_bits, form.method)
    tensors = {f"{name}.{leaf}": tensor for leaf, tensor in made.residual.state_dict().items()}
    for key in form.keys:
        tensors |= factor_tensors(name, key, made.basis(key.side))
    return tensors | residual_tensors(name, form.inward, made.qsvft_s)
