"""``calibrate``: the directions of ``basis="data"``, from a few batches that pass through the model.

    V  the leading eigenvectors of Σ x xᵀ           over the layer's inputs x
    U  the leading eigenvectors of Σ g gᵀ           over the gradients g of the loss by the layer's outputs
       of Σ y yᵀ                                    over the outputs y = W x, where the model has a new head: what it
                                                    asks for before it is trained was drawn at random

Sums run over the tokens of the batches; alpha (``unit="weight"``) is measured on them too, so that an M of alpha times
ones changes W x by at most as much as W x is on average:

    alpha² = Σ |W x|² / (k² Σ |Vᵀ x|²)          |W|_F² / k³ where x is as large in every direction

With ``residual=True`` also what the base's rounding took from V, see :mod:`qsvft.tuner.given_back`.

In these directions the second moments of the gradient Σ g xᵀ are as far from even as they can be, so that its k x k
corner holds the most; and AdamW, which divides by them, comes close to what Shampoo and SOAP do for whole weights
(arXiv 2409.11321).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..maths.covariance import CovarianceSketch
from ..storage.basis_key import BasisKey
from ..storage.factors import StoredBasis
from ..storage.packed import ready_packed
from ..storage.stored_matrix import StoredMatrix
from .config import QSVFTConfig
from .given_back import what_rounding_took
from .progress import progress_shown
from .sources import DataDirections
from .targets import check_targets, rank_of, shape_of
from .tasks import has_new_head

MOST_BATCHES = 16
"""Batches that are looked at, the first of those given."""

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Any], Tensor]


def calibrate(
    model: nn.Module,
    config: QSVFTConfig,
    batches: Iterable[Batch],
    loss: Loss | None = None,
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Find the directions of ``basis="data"`` for the adapters that are attached to a model from now on.

    A few batches of what is to be trained on are enough: some thousand tokens. Each takes a forward and a backward, a
    forward alone where the config's task or ``modules_to_save`` name a new head; M, optimizer and gradients of weights
    there are none. Beside the model it holds (m + n)(k + 32) numbers in fp32 a layer on the CPU.

    Args:
        model: quantised as it will be trained, without the adapter. Nothing of it changes.
        config: of the adapter, with ``basis="data"``.
        batches: keyword arguments of the model, labels among them, as a Trainer's data loader gives them. The first
            16 are taken.
        loss: of the model and a batch; None for ``model(**batch).loss``.
        weights: for ``residual=True`` each layer's name with its weight (m, n) before it was quantised, one at a time;
            names of other layers are passed over.

    Raises:
        ValueError: another basis; no batch; a loss that is no finite number; a layer that no batch reached; a weight
            that is missing, or of another shape.
    """
    if config.basis != "data":
        raise ValueError(
            f"calibrate(): the config has basis={config.basis!r}, which takes nothing from data; expected basis='data'."
        )
    if config.gives_back and weights is None:
        raise ValueError(
            "calibrate(): residual=True with basis='data' gives back what rounding took from the weights; expected "
            "weights=, names with the weights before they were quantised, found none."
        )
    layers = {name: model.get_submodule(name) for name in check_targets(model, config)}
    ready_packed(model)
    watch = _Watch(layers, config, has_new_head(model, config))
    with _frozen(model), watch.attached(), torch.enable_grad():
        few = islice(batches, MOST_BATCHES)
        for batch in tqdm(few, desc="calibrating", unit="batch", leave=False, disable=not progress_shown()):
            watch.see(model, send_to_device(batch, next(model.parameters()).device), loss)
    holder: Any = model
    holder.qsvft_directions = watch.directions()
    if weights is not None and config.gives_back:
        holder.qsvft_directions.add(what_rounding_took(layers, holder.qsvft_directions, config, weights))


def with_basis(fields: Mapping[str, Any], calibration: object, residual: bool) -> dict[str, Any]:
    """Fields of a config that were given one by one. With data, its basis is "data" where they name none, and what
    rounding took is given back (``residual``, where the weights before it are at hand)."""
    if calibration is None or fields.get("basis", "data") != "data":
        return dict(fields)
    return {"basis": "data", "residual": residual, **fields}


def check_calibration(config: QSVFTConfig, calibration: object) -> None:
    """Refuse data for a basis that takes none, and a basis that takes data without any."""
    if (calibration is None) == (config.basis == "data"):
        found = "none" if calibration is None else "some"
        raise ValueError(
            f"calibration: found {found} with basis={config.basis!r}; expected batches of data with basis='data', and "
            "none with any other."
        )


class _Watch:
    """Sums of what passes through some layers."""

    def __init__(self, layers: Mapping[str, nn.Module], config: QSVFTConfig, new_head: bool) -> None:
        self._layers, self._config, self._new_head = layers, config, new_head
        self._recording, self._batches = False, 0
        self._mask: Tensor | None = None
        self._outputs = dict.fromkeys(layers, 0.0)  # Σ |W x|²
        self._inputs: dict[str, CovarianceSketch] = {}
        self._changes: dict[str, CovarianceSketch] = {}  # of g, or of y
        for name, layer in layers.items():
            m, n = shape_of(layer, name)
            rank = rank_of(config, name, (m, n))
            self._inputs[name], self._changes[name] = CovarianceSketch(n, rank), CovarianceSketch(m, rank)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While this lasts, the layers' forwards are looked at."""
        hooks = [layer.register_forward_pre_hook(_ask_for_gradients) for layer in self._layers.values()]
        hooks += [layer.register_forward_hook(self._look(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def see(self, model: nn.Module, batch: Any, loss: Loss | None) -> None:
        """Add a batch."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._recording = True  # not while a checkpoint computes a layer again
        try:
            found = model(**batch).loss if loss is None else loss(model, batch)
        finally:
            self._recording = False
        if not (isinstance(found, Tensor) and bool(torch.isfinite(found.detach()))):
            raise ValueError(
                f"calibration: the loss of batch {self._batches} is {found}; expected a finite number. Give batches "
                "with labels, or loss=, a function of the model and a batch."
            )
        if not self._new_head:
            found.backward()
        self._batches += 1

    def _look(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not self._recording:
                return
            self._inputs[name].add(self._rows(inputs[0].detach()))
            if isinstance(output, Tensor):
                bias = getattr(self._layers[name], "bias", None)
                y = self._rows(output.detach())
                y = y if bias is None else y - bias
                self._outputs[name] += float(torch.linalg.vector_norm(y, dtype=torch.float64).square())
                if self._new_head:
                    self._changes[name].add(y)
            if isinstance(output, Tensor) and output.requires_grad and not self._new_head:
                output.register_hook(lambda g: self._changes[name].add(g.flatten(0, -2)))

        return look

    def _rows(self, x: Tensor) -> Tensor:
        """The tokens of an activation, without those of the padding (whose gradients are zero anyway)."""
        if self._mask is not None and x.shape[:-1] == self._mask.shape:
            return x[self._mask.bool()]
        return x.flatten(0, -2)

    def directions(self) -> DataDirections:
        """U, V and alpha's length of every layer."""
        if not self._batches:
            raise ValueError("calibration: found no batch; expected a few, such as four of those to train on.")
        unseen = [name for name, sketch in self._changes.items() if not sketch.energy]
        if unseen:
            raise ValueError(
                f"{unseen[0]}: no batch of the calibration reached this layer ({len(unseen)} of {len(self._layers)} "
                "such): no gradient came by. Give more batches, or leave those layers out with exclude_modules."
            )
        bits, bases, lengths = self._config.stored_bits, {}, {}
        for side, sketches in (("V", self._inputs), ("U", self._changes)):
            for name, sketch in sketches.items():
                energies, rows = sketch.directions()
                bases[name, BasisKey.data(side, bits, rows.shape[0])] = StoredBasis(StoredMatrix.hold(rows, bits))
                if side == "V":
                    held = float(energies.sum())  # none where all inputs were zeros
                    lengths[name] = (rows.shape[0] * self._outputs[name] / held) ** 0.5 if held else 0.0
        return DataDirections(bases, lengths)


def _ask_for_gradients(_: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Nothing before the first adapted layer trains: its input has to ask for the graph."""
    x = inputs[0]
    if torch.is_grad_enabled() and not x.requires_grad and x.is_floating_point():
        x.requires_grad_()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While this lasts, no parameter asks for a gradient, and the model trains, without dropout."""
    asked = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    rates = [(module, name, vars(module)[name]) for module, _ in modes for name in _dropout_rates(module)]
    try:
        for p in asked:
            p.requires_grad_(False)
        model.train()
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        for module, name, rate in rates:
            setattr(module, name, rate)


def _dropout_rates(module: nn.Module) -> list[str]:
    """The attributes that say how much a module drops: attention and activations are often dropped by a function."""
    named = [name for name, value in vars(module).items() if isinstance(value, float)]
    return [name for name in named if (name == "p" and "Dropout" in type(module).__name__) or "drop" in name]
