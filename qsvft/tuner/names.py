"""Names in a config that match nothing of the model: a mistake, and refused before anything is changed.

PEFT passes over a misspelt name, or warns. A config that was saved with an adapter was checked when it was made, and
its names may be those of another version of the model's class; only what it targets has to be there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any

from peft.utils import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..storage.experts import parameters_of_experts
from ..storage.weights import HeldLinear
from .adapted import AdaptedLinear
from .config import QSVFTConfig
from .tasks import left_whole


def check_names(model: nn.Module, config: QSVFTConfig) -> None:
    """Refuse names of targets, ``exclude_modules`` and ``modules_to_save`` that match nothing.

    Raises:
        ValueError: naming the field, the name, what the model has and what may have been meant.
    """
    names = [name for name, _ in model.named_modules() if name]
    if not isinstance(config.target_modules, str):
        for name in sorted(config.target_modules or ()):
            if not any(_is(one, name) for one in names):
                _refuse(model, "target_modules", name, short_names(model))
    experts = parameters_of_experts(model)
    for name in config.target_parameters or ():
        if not any(_is(one, name) for one in experts):
            _refuse_parameter(model, name, experts)
    for name in config.modules_to_save or ():
        _check_whole(model, name)
    check_tokens(model, config)
    if config.base is not None:
        return
    if isinstance(config.exclude_modules, str):
        if not any(re.fullmatch(config.exclude_modules, one) for one in names):
            _refuse(model, "exclude_modules", config.exclude_modules, short_names(model))
    else:
        single = {one for one in names if _is_single(model.get_submodule(one))}
        for name in sorted(config.exclude_modules or ()):
            if not any(_is(one, name) for one in single):
                _refuse(model, "exclude_modules", name, short_names(model))
    added = left_whole(config)  # by PEFT, whichever of them the model has
    for name in config.modules_to_save or ():
        if name not in added and not any(one.endswith(name) for one in names):
            _refuse(model, "modules_to_save", name, [one for one, _ in model.named_children()] + short_names(model))


def _check_whole(model: nn.Module, name: str) -> None:
    """Refuse a name of ``modules_to_save`` that PEFT would fail at: a list's."""
    for one, module in model.named_modules():
        if one.endswith(name) and isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"modules_to_save: {name!r} means {one}, a {type(module).__name__}, which has no forward; expected "
                "names of modules that have, such as a head."
            )


def check_tokens(model: nn.Module, config: QSVFTConfig) -> None:
    """Refuse ``trainable_token_indices`` that have no row, or not a row of an embedding in 16 or 32 bits.

    Raises:
        ValueError: naming the layer and what it has.
    """
    wanted = _tokens(model, config)
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if tied and len({tuple(sorted(ids)) for ids in wanted.values()}) > 1:
        raise ValueError(
            f"trainable_token_indices: {' and '.join(wanted)} are one weight in this model, whose rows cannot be "
            "trained apart; expected the same ids for both, or a list of ids."
        )
    for name, ids in wanted.items():
        module = next((module for one, module in model.named_modules() if one and _is(one, name)), None)
        weight: Any = getattr(getattr(module, "original_module", module), "weight", None)
        if module is None:
            embeddings = [one for one, module in model.named_modules() if isinstance(module, nn.Embedding)]
            _refuse(model, "trainable_token_indices", name, embeddings)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"trainable_token_indices: {name} is a {type(module).__name__} without a dense weight of tokens; "
                "expected an embedding or a head in 16 or 32 bits. Leave quantize_embeddings at 16."
            )
        if max(ids) >= len(weight):
            raise ValueError(
                f"trainable_token_indices: {max(ids)} is no row of {name}, which has {len(weight)}; expected ids below "
                "that. Call model.resize_token_embeddings() before, for tokens that are new."
            )
        if any(_is(name, one) for one in config.modules_to_save or ()):
            raise ValueError(f"trainable_token_indices: {name} is in modules_to_save as well; expected one of the two.")


def _tokens(model: nn.Module, config: QSVFTConfig) -> dict[str, list[int]]:
    """The token ids by the name of their layer, which is the input embeddings' where none is given."""
    wanted = config.trainable_token_indices
    if wanted is None or isinstance(wanted, dict):
        return wanted or {}
    given: Any = model
    embeddings = given.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    name = next((name for name, module in model.named_modules() if module is embeddings), "embed_tokens")
    return {name: wanted}


def check_rank_pattern(config: QSVFTConfig, targets: Sequence[str]) -> None:
    """Refuse a key of ``rank_pattern`` that is the rank of no layer.

    Args:
        config: the adapter's config.
        targets: the names of the layers that it adapts.
    """
    if config.base is not None:
        return
    for key in config.rank_pattern:
        if not any(get_pattern_key([key], name) == key for name in targets):
            known = sorted({name.rpartition(".")[2] for name in targets})
            close = _hint(key.rpartition(".")[2], known)
            raise ValueError(
                f"rank_pattern: {key!r} matches none of the {len(targets)} layers that are adapted; expected names or "
                f"regular expressions of theirs, such as {', '.join(map(repr, known[:12]))}.{close}"
            )


def short_names(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers."""
    linear = (nn.Linear, Conv1D, AdaptedLinear)
    return sorted({name.split(".")[-1] for name, m in model.named_modules() if name and isinstance(m, linear)})


def _is(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _is_single(module: nn.Module) -> bool:
    """Whether a name excludes this module, and not its children, which go by their own."""
    return isinstance(module, AdaptedLinear | HeldLinear) or not list(module.children())


def _refuse(model: nn.Module, field: str, name: str, known: Collection[str]) -> None:
    several = list(dict.fromkeys(known))
    raise NoMatchingPeftModuleError(
        f"{field}: '{name}' matches no module of {type(model).__name__}; expected names of its linear layers, such as "
        f"{', '.join(map(repr, several[:12])) or 'none: it has no linear layer'}.{_hint(name.split('.')[-1], several)}"
    )


def _refuse_parameter(model: nn.Module, name: str, experts: Sequence[str]) -> None:
    linear = name.removesuffix(".weight")
    if any(_is(one, linear) for one, module in model.named_modules() if one and isinstance(module, nn.Linear | Conv1D)):
        raise ValueError(
            f"target_parameters: {name!r} is the weight of linear layers; expected parameters of experts. Give "
            f"target_modules={[linear.rpartition('.')[-1]]} for these."
        )
    short = list(dict.fromkeys(".".join(one.split(".")[-2:]) for one in experts))
    raise NoMatchingPeftModuleError(
        f"target_parameters: {name!r} matches no parameter of experts of {type(model).__name__}; expected "
        f"{'names such as ' + ', '.join(map(repr, short)) if short else 'None: it has no experts in parameters'}."
        f"{_hint('.'.join(name.split('.')[-2:]), short)}"
    )


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {', '.join(map(repr, close))}?" if close else ""
