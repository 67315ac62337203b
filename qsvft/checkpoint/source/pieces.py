"""A piece of a checkpoint: the least that is read together, and its reading.

One tensor, or those that transformers fuses, splits or permutes into one or several.
"""

from __future__ import annotations

from dataclasses import dataclass

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
class Piece:
    """What is read together; plain values, so that it can be sent to another process or written as JSON.

    Attributes:
        targets: names in ``model.state_dict()``; of tied weights the first alone.
        sources: keys in the checkpoint, in the order in which they are put together.
        dtype: what the sources are cast to, e.g. "bfloat16".
        conversion: None if the one source is the one target as it is.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    dtype: str
    conversion: Conversion | None = None


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
    tensors = (checkpoint.read(key).to(dtype) for key in piece.sources)
    if piece.conversion is None:
        return {piece.targets[0]: next(tensors)}
    results = convert(model, piece.conversion.name, piece.sources, piece.conversion.patterns, tensors)
    return {
        target: results[name].contiguous() for target, name in zip(piece.targets, piece.conversion.results, strict=True)
    }
