"""From a checkpoint's keys to the parameters of its model, by transformers' own conversion.

Everything that can be said from names, shapes and dtypes is said before any tensor is read.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...storage.left_dense import under
from ...storage.tensor_index import first_few
from .architecture import FLOATS, empty_model, model_class, read_config
from .checkpoint import Checkpoint
from .pieces import Conversion, Names, Piece, read_piece
from .renames import Renamed, convert, rename_keys
from .tied import holders, untie_what_differs

__all__ = ["Conversion", "Names", "Piece", "empty_model", "model_class", "pieces_of", "read_config", "read_piece"]


def pieces_of(checkpoint: Checkpoint, model: PreTrainedModel, brought: Collection[str] = ()) -> Names:
    """Match a checkpoint with its model.

    Args:
        checkpoint: its keys, shapes and dtypes are looked at. Values are read of weights alone that the config ties
            and the checkpoint has twice.
        model: of :func:`empty_model`. Tied weights of which the checkpoint has two that differ are untied in it.
        brought: modules that the checkpoint may lack, by any part of their names, since an adapter has them.

    Raises:
        ValueError: parameters or buffers that no key gives and that are not tied to one that is given; two keys for
            one parameter; shapes or dtypes that do not fit; a conversion that transformers cannot do.
    """
    renamed = _renamed(checkpoint, model)
    state = model.state_dict(keep_vars=True)
    groups: dict[str, list[str]] = defaultdict(list)
    for key, (name, pattern) in renamed.items():
        if name in state and not (under(name, brought) and _other(checkpoint.entries[key].shape, state[name], pattern)):
            groups[name].append(key)
    found = [_piece(checkpoint, model, state, name, keys, renamed) for name, keys in groups.items()]
    simple = {piece.targets[0]: piece.sources[0] for piece in found if piece.conversion is None}
    untie_what_differs(checkpoint, model, simple)
    held = holders(model)
    pieces = _each_once(checkpoint, found, held)
    given = {target for piece in pieces for target in piece.targets}
    missing = [name for name, holder in held.items() if holder not in given and not under(name, brought)]
    _check_missing(checkpoint, model, missing)
    return Names(
        pieces=tuple(pieces),
        unknown=tuple(_unknown(model, {key: name for key, (name, _) in renamed.items() if name not in state})),
    )


def _other(shape: tuple[int, ...], tensor: Tensor, pattern: str | None) -> bool:
    return pattern is None and tuple(tensor.shape) != shape


def _renamed(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Renamed]:
    try:
        return rename_keys(model, checkpoint.entries)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint.name}: transformers cannot match its keys with {type(model).__name__} ({error}). Expected a "
            "checkpoint saved from this class or from its base model."
        ) from error


def _piece(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    name: str,
    keys: Sequence[str],
    renamed: Mapping[str, Renamed],
) -> Piece:
    """The piece that transformers calls ``name``; its targets are not yet those that hold."""
    patterns = tuple(pattern for key in keys if (pattern := renamed[key].pattern) is not None)
    if len(keys) > 1 and len(patterns) < len(keys):
        raise ValueError(
            f"{checkpoint.name}: found {first_few(keys)} for the one parameter {name}, expected one key. It is not "
            "clear which is meant: save the checkpoint again from the model (save_pretrained)."
        )
    for key in keys:
        _check_dtype(checkpoint, key, name, state[name].dtype)
    dtype = str(state[name].dtype).removeprefix("torch.")
    if not patterns:
        _check_shape(checkpoint, keys, name, checkpoint.entries[keys[0]].shape, state)
        return Piece((name,), tuple(keys), dtype)
    results = tuple(_results(checkpoint, model, state, name, keys, patterns))
    return Piece(results, tuple(keys), dtype, Conversion(name, patterns, results))


def _results(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    name: str,
    keys: Sequence[str],
    patterns: Sequence[str],
) -> list[str]:
    """What a conversion gives, found by running it on tensors without values."""
    empty = [torch.empty(checkpoint.entries[key].shape, dtype=state[name].dtype, device="meta") for key in keys]
    try:
        results = convert(model, name, keys, patterns, empty)
    except Exception as error:  # an operation's own, or torch's, on shapes that it cannot take
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in empty[:5])
        raise ValueError(
            f"{checkpoint.name}: transformers cannot make {name} of {first_few(keys)}, of shapes {shapes} ({error}). "
            f"Expected a checkpoint of {type(model).__name__}: copy or download it again."
        ) from error
    for result, tensor in results.items():
        _check_shape(checkpoint, keys, result, tuple(tensor.shape), state)
    return list(results)


def _check_dtype(checkpoint: Checkpoint, key: str, name: str, wanted: torch.dtype) -> None:
    found = checkpoint.entries[key].dtype
    if wanted.is_floating_point and found not in FLOATS:
        raise ValueError(
            f"{checkpoint.name}: found {key} of dtype {found} for the floating-point parameter {name}, expected one of "
            f"{', '.join(map(str, FLOATS))}. A quantised checkpoint cannot be prepared: use the one that it was made "
            "from."
        )
    if not wanted.is_floating_point and found.is_floating_point:
        raise ValueError(
            f"{checkpoint.name}: found {key} of dtype {found} for {name}, expected {wanted}, which cannot hold it. "
            "Is the checkpoint of this model? Save it again from the model (save_pretrained)."
        )


def _check_shape(
    checkpoint: Checkpoint, keys: Sequence[str], name: str, shape: tuple[int, ...], state: Mapping[str, Tensor]
) -> None:
    wanted = tuple(state[name].shape) if name in state else "no such parameter"
    if shape != wanted:
        raise ValueError(
            f"{checkpoint.name}: found shape {shape} for {name} (from {first_few(keys)}), expected {wanted} by the "
            "config. The config and the weights are not of one model: copy or download them again."
        )


def _each_once(checkpoint: Checkpoint, found: Sequence[Piece], held: Mapping[str, str]) -> list[Piece]:
    """Pieces under the names that hold; of several that give tied weights, the one that gives the holder itself."""
    repeated = [name for name, count in Counter(t for piece in found for t in piece.targets).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{checkpoint.name}: found several keys for {first_few(repeated)}, expected one each. Save the checkpoint "
            "again from the model (save_pretrained)."
        )
    direct = {name for piece in found for name in piece.targets if held[name] == name}
    taken: set[str] = set()
    pieces: list[Piece] = []
    for piece in found:
        results = piece.conversion.results if piece.conversion is not None else piece.targets
        kept = [
            (held[name], result)
            for name, result in zip(piece.targets, results, strict=True)
            if held[name] == name or held[name] not in direct | taken
        ]
        taken |= {target for target, _ in kept}
        if kept:
            targets = tuple(target for target, _ in kept)
            conversion = piece.conversion and replace(piece.conversion, results=tuple(result for _, result in kept))
            pieces.append(replace(piece, targets=targets, conversion=conversion))
    return pieces


def _check_missing(checkpoint: Checkpoint, model: PreTrainedModel, missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(
            f"{checkpoint.name}: no weights for {first_few(missing)} of {type(model).__name__}; transformers would "
            f"make them up. Expected a key for each parameter: found {len(checkpoint.entries)} keys, e.g. "
            f"{first_few(list(checkpoint.entries)[:3])}. Choose the architecture that the checkpoint was trained as, "
            "or train the new part first and save the whole model."
        )


def _unknown(model: PreTrainedModel, names: Mapping[str, str]) -> list[str]:
    """Keys that the model has no use for, without those of which ``from_pretrained`` keeps silent."""
    buffers = {name for name, _ in model.named_buffers()}
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ())]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    silent = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None
    return [key for key, name in names.items() if name not in buffers and not (silent and silent.search(name))]
