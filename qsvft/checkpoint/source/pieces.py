"""A piece of a checkpoint: the least that is read together, and its reading.

One tensor, or those that transformers fuses, splits or permutes into one or several.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint import Checkpoint
from .renames import convert


@dataclass(frozen=True)
class Conversion:
    """How transformers makes one or several tensors of those that are read.

    Attributes:
        name: what transformers calls it by: the first target.
        patterns: for each source, the pattern of the converter that takes it.
        results: names of what comes out, one for each target of the piece.
    """

    name: str
    patterns: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One expert of a parameter that holds several.

    Attributes:
        number: which, along the first dimension.
        transposed: whether its layer has the other two the other way round.
    """

    number: int
    transposed: bool


@dataclass(frozen=True)
class Piece:
    """What is read together; plain values, so that it can be sent to another process or written as JSON.

    Attributes:
        targets: names in ``model.state_dict()``; of tied weights the first alone; of an expert its layer's.
        sources: keys in the checkpoint, in the order in which they are put together.
        dtype: what the sources are cast to, e.g. "bfloat16".
        conversion: None if the one source is the one target as it is.
        part: of what is read, or made by the conversion, the one expert that is meant; None for all.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    dtype: str
    conversion: Conversion | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Names:
    """How a checkpoint gives a model's state.

    Attributes:
        pieces: together they give every tensor of the state dict once, tied ones under their first name.
        unknown: keys that the model has no use for, without those that it is known to ignore.
    """

    pieces: tuple[Piece, ...]
    unknown: tuple[str, ...]


def read_piece(checkpoint: Checkpoint, piece: Piece, model: PreTrainedModel) -> dict[str, Tensor]:
    """Read a piece.

    Args:
        checkpoint: where its tensors are.
        piece: which.
        model: of :func:`empty_model`.

    Returns:
        The tensors by their names in the state dict, contiguous, in the dtype that ``from_pretrained`` gives them.
        Those that need no cast and no conversion are mapped from the file.

    Raises:
        ValueError: a file changed since the checkpoint was opened.
    """
    dtype = getattr(torch, piece.dtype)
    if piece.part is None:
        return _converted(checkpoint, piece, model, dtype)
    number, transposed = piece.part.number, piece.part.transposed
    if piece.conversion is None:
        expert = checkpoint.read(piece.sources[0])[number].to(dtype)
    else:
        expert = _all_experts(checkpoint, piece, model, dtype)[number]
    return {piece.targets[0]: (expert.t() if transposed else expert).contiguous()}


def _converted(checkpoint: Checkpoint, piece: Piece, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = (checkpoint.read(key).to(dtype) for key in piece.sources)
    if piece.conversion is None:
        return {piece.targets[0]: next(tensors)}
    results = convert(model, piece.conversion.name, piece.sources, piece.conversion.patterns, tensors)
    return {
        target: results[name].contiguous() for target, name in zip(piece.targets, piece.conversion.results, strict=True)
    }


_LAST: WeakKeyDictionary[PreTrainedModel, tuple[object, Tensor]] = WeakKeyDictionary()


def _all_experts(checkpoint: Checkpoint, piece: Piece, model: PreTrainedModel, dtype: torch.dtype) -> Tensor:
    """What a conversion makes; the last one is kept, since the experts of one parameter are read one after another."""
    wanted = (checkpoint, piece.sources, piece.conversion, dtype)
    if model not in _LAST or _LAST[model][0] != wanted:
        _LAST.pop(model, None)
        (made,) = _converted(checkpoint, piece, model, dtype).values()
        _LAST[model] = (wanted, made)
    return _LAST[model][1]
