"""Checkpoint keys to a model's names, by the installed transformers' own rules.

transformers has a table of renames and conversions per model, and adds or takes away the prefix of the base model.
Where the table is not as it was, names are taken as they are, with the same rule of the prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel


def _table_modules() -> tuple[Any, Any]:
    """transformers' modules that know the table; None and None where they are not, or are not as they were."""
    try:
        mapping, loading = (
            import_module(f"transformers.{name}") for name in ("conversion_mapping", "core_model_loading")
        )
    except ImportError:
        return None, None
    needed = ("rename_source_key", "dot_natural_key", "WeightRenaming", "WeightConverter", "revert_weight_conversion")
    known = hasattr(mapping, "get_model_conversion_mapping") and all(hasattr(loading, name) for name in needed)
    return (mapping, loading) if known else (None, None)


conversion_mapping, core = _table_modules()


class Renamed(NamedTuple):
    """What a checkpoint's key becomes: the name (of several, the first), and the pattern of its converter, if any."""

    name: str
    pattern: str | None


def rename_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Renamed]:
    """What each key becomes, in the order in which transformers loads them.

    Args:
        model: on the meta device.
        keys: of the checkpoint.

    Returns:
        By key; names that the model does not have are among them.

    Raises:
        ValueError: transformers takes the checkpoint for a damaged one.
    """
    if core is not None:
        return _by_table(model, sorted(keys, key=core.dot_natural_key))
    return _by_prefix(model, sorted(keys, key=natural_key))


def convert(
    model: PreTrainedModel, name: str, sources: Sequence[str], patterns: Sequence[str], tensors: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Run a converter on the tensors of one piece.

    Args:
        model: on the meta device; it says which converter the patterns are of.
        name: the first target.
        sources: the keys.
        patterns: of each key.
        tensors: of each key, taken one after another.

    Returns:
        The targets' tensors by name.
    """
    converter = deepcopy(_transforms(model).converters[patterns[0]])
    for key, pattern, tensor in zip(sources, patterns, tensors, strict=True):
        converter.add_tensor(name, key, pattern, tensor)
    found = converter.convert(name, model=model, config=model.config)
    return {target: value[0] if isinstance(value, list) else value for target, value in found.items()}


def as_in_checkpoints(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by the names, and in the shapes, that its checkpoints have: loading, the other way round.

    Args:
        model: on the meta device, made of a config.
        tensors: by their names in its state; all that are converted together.
    """
    return core.revert_weight_conversion(model, tensors) if core is not None else tensors


def dtype_pattern(modules: Sequence[str]) -> re.Pattern[str]:
    """What transformers looks for in a name to see whether it belongs to one of these modules."""
    if core is not None and hasattr(core, "build_glob_alternation"):
        return core.build_glob_alternation(list(modules))[0]
    return re.compile("|".join(rf"((^|\.){module}($|\.))" for module in modules))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


class _Transforms(NamedTuple):
    renamings: list[Any]
    ordered: list[Any]
    converters: dict[str, Any]


_KNOWN: WeakKeyDictionary[PreTrainedModel, _Transforms] = WeakKeyDictionary()


def _transforms(model: PreTrainedModel) -> _Transforms:
    """The table of a model; kept, since it is asked for with every piece."""
    if model not in _KNOWN:
        _KNOWN[model] = _read_table(model)
    return _KNOWN[model]


def _read_table(model: PreTrainedModel) -> _Transforms:
    table = conversion_mapping.get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, core.WeightConverter)]
    return _Transforms(
        renamings=[entry for entry in table if isinstance(entry, core.WeightRenaming)],
        ordered=converters,
        converters={pattern: entry for entry in converters for pattern in entry.source_patterns},
    )


def _by_table(model: PreTrainedModel, ordered: Sequence[str]) -> dict[str, Renamed]:
    # Read anew: some renamings remember which keys they saw.
    table = _read_table(model)
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Renamed] = {}
    for key in ordered:
        name, pattern = core.rename_source_key(key, table.renamings, table.ordered, prefix, state)
        if name not in state and key in state:
            name, pattern = core.rename_source_key(key, [], [], prefix, state)
        found[key] = Renamed(name, pattern)
    return found


def _by_prefix(model: PreTrainedModel, ordered: Sequence[str]) -> dict[str, Renamed]:
    prefix = model.base_model_prefix
    has_prefix = bool(prefix) and any(key.startswith(prefix) for key in ordered)
    expects_prefix = bool(prefix) and hasattr(model, prefix)
    names = {key: key for key in ordered}
    if has_prefix and not expects_prefix:
        names = {key: key.removeprefix(f"{prefix}.") for key in ordered}
    elif expects_prefix and not has_prefix:
        names = {key: f"{prefix}.{key}" for key in ordered}
    return {key: Renamed(name, None) for key, name in names.items()}
