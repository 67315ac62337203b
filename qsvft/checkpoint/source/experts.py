"""Pieces for single experts: of a parameter that holds them all, each expert is read by itself.

Where a checkpoint has a tensor for each expert, those of one are read; where it has the parameter as it is, a part of
it. A conversion that cannot be done for one expert is done for all, once for those that follow each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...storage.experts import expert_layers
from .checkpoint import Checkpoint
from .pieces import Conversion, Part, Piece
from .renames import convert


@dataclass(frozen=True)
class _Held:
    """What a parameter of experts becomes: the leaf of each layer, and whether the layer has it transposed."""

    layers: str
    leaf: str
    transposed: bool
    shape: tuple[int, ...]


def pieces_of_experts(
    checkpoint: Checkpoint, whole: PreTrainedModel, split: nn.Module, pieces: Sequence[Piece]
) -> list[Piece]:
    """The pieces of a model whose experts are linear layers.

    Args:
        checkpoint: the source.
        whole: on the meta device, with experts in parameters.
        split: the same with linear layers in their place, or some.
        pieces: of ``whole``.
    """
    held = dict(_held(whole, split))
    found: list[Piece] = []
    for piece in pieces:
        others = tuple(name for name in piece.targets if name not in held)
        if others:
            found.append(_without(piece, others))
        for target in piece.targets:
            if target in held:
                found.extend(_experts(checkpoint, whole, piece, target, held[target]))
    return found


def _held(whole: PreTrainedModel, split: nn.Module) -> Iterator[tuple[str, _Held]]:
    tensors = dict(whole.named_parameters())
    for parameter in set(expert_layers(split).values()):
        experts = whole.get_submodule(parameter.rpartition(".")[0])
        yield parameter, _Held(parameter, "weight", bool(experts.is_transposed), tuple(tensors[parameter].shape))
        if (bias := f"{parameter}_bias") in tensors:
            yield bias, _Held(parameter, "bias", False, tuple(tensors[bias].shape))


def _without(piece: Piece, kept: tuple[str, ...]) -> Piece:
    if kept == piece.targets or piece.conversion is None:
        return piece
    results = dict(zip(piece.targets, piece.conversion.results, strict=True))
    conversion = replace(piece.conversion, results=tuple(results[name] for name in kept))
    return replace(piece, targets=kept, conversion=conversion)


def _experts(checkpoint: Checkpoint, whole: PreTrainedModel, piece: Piece, target: str, held: _Held) -> Iterator[Piece]:
    """A piece for each expert of a parameter."""
    one = _without(piece, (target,))
    apart = _apart(checkpoint, whole, one, held)
    for number in range(held.shape[0]):
        name = f"{held.layers}.{number}.{held.leaf}"
        if apart is None:
            yield replace(one, targets=(name,), part=Part(number, held.transposed))
        else:
            sources, conversion = apart[number]
            yield replace(one, targets=(name,), sources=sources, conversion=conversion, part=Part(0, held.transposed))


def _apart(
    checkpoint: Checkpoint, whole: PreTrainedModel, piece: Piece, held: _Held
) -> list[tuple[tuple[str, ...], Conversion]] | None:
    """Sources and conversion of each expert; None where a conversion needs all experts' tensors, or there is none."""
    if piece.conversion is None:
        return None
    of_pattern: dict[str, list[str]] = defaultdict(list)
    for source, pattern in zip(piece.sources, piece.conversion.patterns, strict=True):
        of_pattern[pattern].append(source)
    if len(piece.sources) == 1 or any(len(sources) != held.shape[0] for sources in of_pattern.values()):
        return None
    conversion = replace(piece.conversion, patterns=tuple(of_pattern))
    each = [tuple(sources) for sources in zip(*of_pattern.values(), strict=True)]
    empty: list[Tensor] = [
        torch.empty(checkpoint.entries[key].shape, dtype=checkpoint.entries[key].dtype, device="meta")
        for key in each[0]
    ]
    try:
        results = convert(whole, conversion.name, each[0], conversion.patterns, empty)
    except Exception:  # an operation's own, or torch's: it wants all of them
        return None
    found = results.get(conversion.results[0])
    if found is None or tuple(found.shape) != (1, *held.shape[1:]):
        return None
    return [(sources, conversion) for sources in each]
