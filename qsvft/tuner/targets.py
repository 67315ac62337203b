"""Which layers a config means, and whether it fits them: checked before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..storage.experts import expert_layers
from ..storage.left_dense import under
from ..storage.linear_layers import is_other_linear, read_directly
from ..storage.packed import is_packed, note_dtype, packing
from ..storage.residual import ResidualLinear
from ..storage.routers import routers
from ..storage.weights import HeldLinear, check_weight
from .adapted import AdaptedLinear
from .config import DENSE_RANK, QSVFTConfig
from .experts import is_named
from .names import check_names, check_rank_pattern, short_names
from .slow_patterns import check_patterns
from .tasks import left_whole

logger = logging.get_logger(__name__)


def check_targets(model: nn.Module, config: QSVFTConfig, left_whole: Sequence[str] = ()) -> list[str]:
    """Check a config against every layer it targets; change nothing (packed layers learn the model's dtype).

    Args:
        model: the model, quantised or not, with or without adapters.
        config: the adapter's config.
        left_whole: modules that will train whole (heads), besides config.modules_to_save.

    Returns:
        The names of the layers that will be adapted.

    Raises:
        NoMatchingPeftModuleError: a ValueError: a name that matches nothing, or no layer left.
        ValueError: a rank or a band too large for every layer, a weight that cannot be decomposed.
        TypeError: a target that is not a linear layer.
    """
    note_dtype(model)
    check_patterns(config, [name for name, _ in model.named_modules()])
    wanted = copy.copy(config)
    wanted.modules_to_save = [*(config.modules_to_save or []), *left_whole] or None
    if config.target_modules == "all-linear":
        wanted.target_modules = all_linear(model, wanted)
    check_names(model, config)
    adapters = [f"{name}." for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    names = [
        name
        for name, _ in model.named_modules()
        if name and not any(name.startswith(a) for a in adapters) and is_target(wanted, name)
    ]
    if not names:
        numbers = config.layers_to_transform
        within = (
            "" if numbers is None else f", layers_to_transform={numbers!r}, layers_pattern={config.layers_pattern!r}"
        )
        if config.target_parameters:
            within += f", target_parameters={config.target_parameters!r}"
        raise NoMatchingPeftModuleError(
            f"no layer of {type(model).__name__} is left to adapt: target_modules={config.target_modules!r}, "
            f"exclude_modules={config.exclude_modules!r}, modules_to_save={wanted.modules_to_save!r}{within}. Expected "
            f"at least one linear layer; it has {short_names(model) or 'none'}."
        )
    check_rank_pattern(config, names)
    _check_layers(wanted, names)
    shapes = {name: shape_of(model.get_submodule(name), name) for name in names}
    read = read_directly(model)
    for name in names:
        layer = model.get_submodule(name)
        if name in read:
            raise ValueError(
                f"{name}: {read[name]} reads this layer's weight itself, an adapter on it would do nothing. Add it to "
                "exclude_modules."
            )
        if is_other_linear(layer):
            raise TypeError(
                f"{name}: cannot adapt a {type(layer).__name__}, whose forward computes something else than W x + b. "
                "Leave it out of target_modules, or add it to exclude_modules."
            )
        check_weight(name, layer.original_base() if isinstance(layer, AdaptedLinear) else layer)
        if config.residual_base:
            _check_dense(name, layer)
            _check_quantisable(name, model)
    _check_rank(config, shapes)
    _check_band(config, {name: rank_of(config, name, shape) for name, shape in shapes.items()})
    return names


def is_target(config: QSVFTConfig, name: str) -> Any:
    """Whether a config means a module of this name: PEFT's rule and its answer, for experts by their parameters."""
    found = check_target_module_exists(config, name)
    parameter, _, number = name.rpartition(".")
    if found or not number.isdigit() or not is_named(config, parameter):
        return found
    one = copy.copy(config)
    one.target_modules = {".".join(name.split(".")[-2:])}
    return check_target_module_exists(one, name)  # not if it is excluded, or within another block


def _check_layers(wanted: QSVFTConfig, names: Sequence[str]) -> None:
    """A number of ``layers_to_transform`` that no layer has is a mistake."""
    numbers = wanted.layers_to_transform
    if wanted.base is not None or numbers is None:
        return
    for number in [numbers] if isinstance(numbers, int) else numbers:
        if not any(_in_layers(wanted, [number], name) for name in names):
            found = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
            raise NoMatchingPeftModuleError(
                f"layers_to_transform: {number} is the number of no layer that is adapted; expected numbers of the "
                f"model's layers, as in their names (found {', '.join(map(str, found[:20])) or 'none'})."
            )


def _in_layers(config: QSVFTConfig, numbers: int | list[int], name: str) -> bool:
    """Whether a layer is within the blocks of these numbers, by PEFT's rule for its last name."""
    one = copy.copy(config)
    one.layers_to_transform, one.target_modules = numbers, {name.rpartition(".")[-1]}
    one.exclude_modules = one.modules_to_save = None
    return bool(check_target_module_exists(one, name))


def _check_band(config: QSVFTConfig, ranks: Mapping[str, int]) -> None:
    """A band that not one of the layers can hold is a mistake; a layer that has few directions takes all of M."""
    d = config.off_diagonals
    narrow = [name for name, rank in ranks.items() if rank <= d]
    if config.pattern in ("plain", "dense") or not narrow:
        return
    most = max(ranks, key=lambda name: ranks[name])
    if len(narrow) == len(ranks):
        raise ValueError(
            f"{most}: off_diagonals={d} needs a rank above it, found rank {ranks[most]}, the highest of all layers. "
            f"Expected off_diagonals of at most {ranks[most] - 1}: lower it, or use pattern='plain' or 'dense'."
        )
    shown = ", ".join(f"{name} (k = {ranks[name]})" for name in narrow[:3])
    logger.warning_once(
        f"off_diagonals={d} is cut to k - 1, which is all of M, in {len(narrow)} of {len(ranks)} layers, which have "
        f"fewer directions: {shown}{', ...' if len(narrow) > 3 else ''}"
    )


def _check_rank(config: QSVFTConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    """A rank that not one of the layers has is a mistake; a layer that has fewer directions takes all of its own."""
    most = max(shapes, key=lambda name: min(shapes[name]))
    limit = min(shapes[most])
    if config.rank not in (None, DENSE_RANK) and config.rank > limit:
        m, n = shapes[most]
        raise ValueError(
            f"rank={config.rank} is over the limit of every layer; {most}, which has the most directions, is {m} x "
            f"{n}. Expected a rank of at most {limit}."
        )


def _check_dense(name: str, layer: nn.Module) -> None:
    """residual=True quantises by itself, from the dense weight."""
    base = layer.original_base() if isinstance(layer, AdaptedLinear) else layer
    if type(base) not in (nn.Linear, Conv1D, ResidualLinear) or is_packed(base):
        raise ValueError(
            f"{name}: residual=True needs the dense weight, found a {packing(base)}. Expected the model as it is "
            "loaded in bf16: the adapter quantises the residual itself, so leave out qsvft.quantize() and "
            "quantization_config."
        )


def _check_quantisable(name: str, model: nn.Module) -> None:
    if under(name, getattr(model, "_keep_in_fp32_modules", None) or ()):
        raise ValueError(
            f"{name}: residual=True holds this layer in 4 bits, and {type(model).__name__} asks for it in 32; expected "
            "a layer that may be quantised. Add it to exclude_modules, or leave residual out."
        )


def all_linear(model: nn.Module, config: QSVFTConfig) -> set[str]:
    """The layers that "all-linear" means: PEFT's rule, less those that their parent never calls (such as what
    nn.MultiheadAttention reads), heads that PEFT trains whole for the task, subclasses of nn.Linear that compute
    something else, routers and gates, and experts, which ``target_parameters`` names."""
    wanted = copy.copy(config)
    wanted.target_modules = "all-linear"
    _maybe_include_all_linear_layers(wanted, model)
    heads = tuple(left_whole(config))  # PEFT trains whole what ends so, DistilBERT's pre_classifier as well
    named = {*(wanted.target_modules or ()), *_packed(model)}
    found = {name for name in named if not any(one.endswith(heads) for one in name.split("."))}
    found -= {*read_directly(model), *routers(model), *expert_layers(model)}
    if config.layers_to_transform is not None:
        found = {name for name in found if _in_layers(config, config.layers_to_transform, name)}
    for name, module in model.named_modules():
        if is_other_linear(module):
            found.discard(name)
        elif isinstance(module, HeldLinear) and (inside := {one for one in found if one.startswith(f"{name}.")}):
            found = found - inside | {name}  # the layer itself, not what it holds its weight in
    return found


def _packed(model: nn.Module) -> set[str]:
    """Layers of other libraries that are no nn.Linear, which PEFT's rule does not know, but for the output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    bases = {id(module.get_base_layer()) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    return {
        name
        for name, module in model.named_modules()
        if is_packed(module) and module is not head and id(module) not in bases
    }


def shape_of(layer: nn.Module, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, however it stores its weight."""
    nf, nx = getattr(layer, "nf", None), getattr(layer, "nx", None)
    if isinstance(nf, int) and isinstance(nx, int):
        return nf, nx
    m, n = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if not (isinstance(m, int) and isinstance(n, int)):
        raise TypeError(
            f"{name}: cannot adapt a {type(layer).__name__}; expected a linear layer (with in_features and "
            "out_features) or a Conv1D. Leave it out of target_modules, or add it to exclude_modules."
        )
    return m, n


def rank_of(config: QSVFTConfig, name: str, shape: tuple[int, int]) -> int:
    """k of a layer of shape (outputs, inputs): ``config.rank``, or all directions of a layer that has fewer.

    Raises:
        ValueError: ``rank_pattern`` asks for more than there are.
    """
    (m, n), limit = shape, min(shape)
    rank = limit if config.rank is None else min(config.rank, limit)
    key = get_pattern_key(list(config.rank_pattern), name)
    if key in config.rank_pattern:
        rank = config.rank_pattern[key]
    if rank > limit:
        raise ValueError(
            f"{name}: rank={rank} in rank_pattern is over the limit; its weight is {m} x {n}, expected a rank of "
            f"at most {limit}."
        )
    return rank
