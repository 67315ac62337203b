"""What preparing a checkpoint consists of: units of work, each finished and written by itself.

A unit is one linear layer, or what is copied as it is: one large weight (embeddings, head), or all the small ones
(norms, biases) together. The plan follows from the model's shapes and the options alone, so that whoever resumes
comes to the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...maths.decomposition import Sides
from ...storage.factors import needed_sides
from ...storage.nf4 import BLOCK, NESTED_BLOCK
from ...storage.quantization import partition_linears
from ...storage.shapes_only import shapes_only
from ...storage.stored_matrix import StoredMatrix
from ...tuner.config import QSVFTConfig
from ...tuner.form import Form, form_of
from ...tuner.targets import check_targets, rank_of, shape_of
from ..source.names import Piece

SMALL_BYTES = 4 * 2**20
"""Weights that are copied as they are and larger than this have a file of their own."""

_TABLES = 4 * (16 + 256) + 256  # NF4's and the nested code, and a quantisation state in JSON


@dataclass(frozen=True)
class Options:
    """What decides the result, beside the checkpoint.

    Attributes:
        bits: 4, 8 or 16, how the base is held.
        config: of the adapters that the factors are for.
        dtype: of the weights before they are quantised, by name.
        left_whole: heads that are trained whole for the task, and left as they are.
    """

    bits: int
    config: QSVFTConfig
    dtype: str
    left_whole: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON: bits, dtype and the fields of the config that count."""
        return {"bits": self.bits, "dtype": self.dtype, "adapter": self.config.factor_options()}


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of the model.

    Attributes:
        name: in the model.
        shape: (outputs, inputs).
        held: "quantised", "residual" (NF4 of what the directions leave) or "dense" (as it was).
        conv: whether it is a Conv1D, which has its weight the other way round.
    """

    name: str
    shape: tuple[int, int]
    held: str
    conv: bool = False


@dataclass(frozen=True)
class StoredForm:
    """A form whose bases are stored: what an adapter of this config reads at a layer.

    Attributes:
        layer: its name.
        form: the map and the keys of its bases.
        rank: k.
    """

    layer: str
    form: Form
    rank: int


@dataclass(frozen=True)
class Unit:
    """What is read, computed and written together.

    Attributes:
        name: of the unit, for people.
        pieces: what is read from the checkpoint.
        tensors: the model's tensors that it is responsible for.
        layer: the linear layer that it is, if it is one.
        stored: what is decomposed, if anything.
        cost: about how many floating point operations it takes.
        nbytes: about how many bytes are written.
        working_set: about how many bytes of memory it takes at its peak, beside what is mapped from the source.
    """

    name: str
    pieces: tuple[Piece, ...]
    tensors: tuple[str, ...]
    layer: LinearLayer | None = None
    stored: StoredForm | None = None
    cost: float = 0.0
    nbytes: int = 0
    working_set: int = 0


def plan_units(model: PreTrainedModel, pieces: Sequence[Piece], options: Options) -> list[Unit]:
    """Divide the work.

    Args:
        model: on the meta device, with experts as linear layers.
        pieces: how each of its tensors is read.
        options: what decides the result.

    Raises:
        ValueError: what :func:`qsvft.prepare` raises for targets and ranks that do not fit the model.
    """
    of_target = {target: piece for piece in pieces for target in piece.targets}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    with shapes_only():
        targets = check_targets(model, options.config, options.left_whole)
    forms = {stored.layer: stored for stored in stored_forms(model, options.config, targets)}
    units = [
        _unit(layer, forms.get(layer.name), options, of_target, sizes)
        for layer in _linear_layers(model, targets, options)
    ]
    taken = {tensor for unit in units for tensor in unit.tensors}
    return [*units, *_copies(pieces, taken, sizes)]


def plan_digest(units: Sequence[Unit], options: Options) -> str:
    """SHA-256 of a plan: the same for everyone who resumes it."""
    text = json.dumps([options.record(), [asdict(unit) for unit in units]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _linear_layers(model: PreTrainedModel, targets: Sequence[str], options: Options) -> Iterator[LinearLayer]:
    """The linear layers that are more than copied, in the model's order."""
    skip = [*(options.config.modules_to_save or ()), *options.left_whole]
    quantised = set() if options.bits == 16 else set(partition_linears(model, skip)[0])
    for name, module in model.named_modules():
        if name in targets or name in quantised:
            residual = options.config.residual and name in targets
            held = "residual" if residual else "quantised" if name in quantised else "dense"
            yield LinearLayer(name, shape_of(module, name), held, isinstance(module, Conv1D))


def stored_forms(model: PreTrainedModel, config: QSVFTConfig, targets: Sequence[str]) -> list[StoredForm]:
    """What is decomposed for a config.

    Args:
        model: on meta or not, without adapters.
        config: of the adapters.
        targets: the layers it means.
    """
    if config.basis != "singular":
        return []
    found = []
    for name in targets:
        shape = shape_of(model.get_submodule(name), name)
        rank = rank_of(config, name, shape)
        found.append(StoredForm(name, form_of(config, shape, rank), rank))
    return found


def _unit(
    layer: LinearLayer,
    stored: StoredForm | None,
    options: Options,
    of_target: dict[str, Piece],
    sizes: dict[str, int],
) -> Unit:
    weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
    tensors = tuple(name for name in (weight, bias) if name in of_target)
    written = _weight_bytes(layer, options.bits, sizes[weight]) + (sizes[bias] if bias in tensors else 0)
    cost, needed = _read_cost(layer.shape[0] * layer.shape[1]), sizes[weight]
    if stored is not None:
        written += _factor_bytes(stored, layer.shape, options.config.stored_bits)
        cost += _cost(stored, layer.shape)
        needed += _needed(stored, layer)
    return Unit(
        name=layer.name,
        pieces=tuple(dict.fromkeys(of_target[name] for name in tensors)),
        tensors=tensors,
        layer=layer,
        stored=stored,
        cost=cost,
        nbytes=written,
        working_set=written + needed,
    )


def _weight_bytes(layer: LinearLayer, bits: int, dense: int) -> int:
    """Codes and scales of a weight, as bitsandbytes saves it."""
    m, n = layer.shape
    if layer.held == "dense":
        return dense
    if layer.held == "quantised" and bits == 8:
        return m * n + 4 * m
    blocks = -(-m * n // BLOCK)
    return (m * n + 1) // 2 + blocks + 4 * -(-blocks // NESTED_BLOCK) + _TABLES


def _factor_bytes(stored: StoredForm, shape: tuple[int, int], bits: int) -> int:
    sides: Sides = "both" if stored.form.kind == "both" else "one"
    sizes = [size for size, needed in zip(shape, needed_sides(sides, shape), strict=True) if needed]
    return sum(_held_bytes(stored.rank, size, bits) for size in sizes) + 4 * (stored.rank + 1)


@cache
def _held_bytes(rank: int, size: int, bits: int) -> int:
    """Of one factor; the layers of a model have few shapes."""
    return StoredMatrix.hold(torch.empty(rank, size, dtype=torch.float32, device="meta"), bits).nbytes


def _needed(stored: StoredForm, layer: LinearLayer) -> int:
    """Bytes at the peak of a decomposition, in fp64, beside the weight as held made dense.

    Exact: the Gram matrix, its copy that becomes the eigenvectors, LAPACK's work space of twice that, and the vectors
    turned to rows; with both sides the images of all directions, normalised, and in order. Randomized: the Krylov
    space, its orthonormal basis and images. A residual is taken in fp64 as a whole, with its factors.
    """
    small, large = sorted(layer.shape)
    if stored.form.method.randomized:
        numbers = 12 * stored.rank * small + 4 * stored.rank * large
    else:
        numbers = 6 * small * small + (3 * stored.rank * large if stored.form.kind == "both" else 0)
    if layer.held == "residual":
        numbers += 4 * small * large
    return stored.form.method.dtype.itemsize * numbers


def _read_cost(elements: int) -> float:
    """Reading, quantising and writing, in operations that take as long."""
    return 2500.0 * elements


def _cost(stored: StoredForm, shape: tuple[int, int]) -> float:
    """Operations of a decomposition: Gram matrix and eigenvectors, or the passes of subspace iteration; lengths."""
    elements, small = shape[0] * shape[1], min(shape)
    lengths = 2.0 * elements * stored.rank
    if stored.form.method.randomized:
        return 14.0 * stored.rank * elements + lengths
    return 2.0 * small * elements + 10.0 * small**3 + lengths


def _copies(pieces: Sequence[Piece], taken: set[str], sizes: dict[str, int]) -> Iterator[Unit]:
    """A unit for each large tensor that is no linear layer's, and one for all the small ones."""
    small: list[tuple[Piece, tuple[str, ...]]] = []
    for piece in pieces:
        tensors = tuple(name for name in piece.targets if name not in taken)
        size = sum(sizes[name] for name in tensors)
        if size > SMALL_BYTES:
            yield Unit(tensors[0], (piece,), tensors, cost=_read_cost(size), nbytes=size, working_set=size)
        elif tensors:
            small.append((piece, tensors))
    if small:
        names = tuple(name for _, tensors in small for name in tensors)
        size = sum(sizes[name] for name in names)
        yield Unit("norms and biases", tuple(piece for piece, _ in small), names, nbytes=size, working_set=size)
