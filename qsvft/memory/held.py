"""What a model holds: every tensor that can be reached from it, what it is, and its bytes.

Walked are parameters with their quantisation states and gradients, buffers, and what stands outside of
torch's registers: tensors in a module's plain attributes, in lists and dicts there, and modules that are
in no module tree (a base layer set aside by a merge). Each storage counts once, where it is met first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..lean.vocabulary import QuantizedModule, vocabulary_of

BASE, STATE = "base weights", "quantisation state"
VOCABULARY, SMALL, WEIGHTS = "embeddings and head", "norms and biases", "other weights"
FACTORS, SCALES, M = "factors", "scales", "M"
WHOLE, TRAINABLE, GRADIENTS = "modules to save", "other trainable parameters", "gradients"
PATTERNS, BUFFERS, OUTSIDE = "patterns and probes", "other buffers", "outside the module tree"
KINDS = (
    *(BASE, STATE, VOCABULARY, SMALL, WEIGHTS),
    *(FACTORS, SCALES, M, WHOLE, TRAINABLE, GRADIENTS, PATTERNS, BUFFERS, OUTSIDE),
)
_ADAPTERS = {"qsvft_M": M, "qsvft_bases": FACTORS, "qsvft_scale": SCALES, "qsvft_s": SCALES}
_RIVALS_FACTORS = ("U", "s", "V")
_REGISTERS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Held:
    """One tensor of a model: its name, and which of :data:`KINDS` it is."""

    name: str
    tensor: Tensor
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of its whole storage."""
        return self.tensor.untyped_storage().nbytes()


def held(model: nn.Module) -> Iterator[Held]:
    """Every tensor that can be reached from a model, each storage once."""
    seen: set[int] = set()
    for item in chain(_registered(model), _gradients(model), _unregistered(model)):
        key = id(item.tensor.untyped_storage())
        if key not in seen:
            seen.add(key)
            yield item


def held_tensors(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """What a model holds before a step, with the ledger's category."""
    for item in held(model):
        if item.kind == GRADIENTS:
            continue
        if isinstance(item.tensor, nn.Parameter) and item.tensor.requires_grad:
            yield item.tensor, "trainable"
        elif item.kind in (BASE, STATE):
            yield item.tensor, "base weights"
        else:
            yield item.tensor, "factors" if item.kind in (FACTORS, SCALES) else "other weights"


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that a (prepared) model holds, by kind; gradients are left out.

    Returns:
        "base": the frozen weights with their quantisation state, "factors": U, V and their scales, "M":
        the trainable coefficients, "other": anything else (patterns, probes, modules to save). Storage
        shared by several tensors counts once.
    """
    totals = {"base": 0, "factors": 0, "M": 0, "other": 0}
    for item in held(model):
        if item.kind in (FACTORS, SCALES):
            totals["factors"] += item.nbytes
        elif item.kind in (WHOLE, PATTERNS, OUTSIDE):
            totals["other"] += item.nbytes
        elif item.kind != GRADIENTS:
            totals["M" if item.kind == M else "base"] += item.nbytes
    return totals


def _registered(model: nn.Module) -> Iterator[Held]:
    """Parameters with the quantisation state that they carry, and buffers."""
    modules = dict(model.named_modules())
    vocabulary, seen = _vocabulary(model), set(map(id, modules.values()))
    # Before anything is frozen, that a parameter trains says nothing about it.
    chosen = any(not parameter.requires_grad for parameter in model.parameters())
    for prefix, module in modules.items():
        of_vocabulary = id(module) in vocabulary
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}".lstrip(".")
            kind = TRAINABLE if chosen and parameter.requires_grad else _weight_kind(parameter, of_vocabulary)
            yield Held(name, parameter, _adapter_kind(name) or kind)
            for inner, tensor in _inside(name, vars(parameter), seen):
                yield Held(inner, tensor, STATE)
        for leaf, buffer in module.named_buffers(recurse=False):
            name = f"{prefix}.{leaf}".lstrip(".")
            kind = VOCABULARY if of_vocabulary else FACTORS if leaf in _RIVALS_FACTORS else BUFFERS
            yield Held(name, buffer, _adapter_kind(name) or kind)


def _gradients(model: nn.Module) -> Iterator[Held]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield Held(f"{name}.grad", parameter.grad, GRADIENTS)


def _unregistered(model: nn.Module) -> Iterator[Held]:
    """What stands in the plain attributes of modules; in bitsandbytes' objects it is quantisation state."""
    modules = dict(model.named_modules())
    seen = set(map(id, modules.values()))
    for prefix, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute not in _REGISTERS:
                kind = STATE if _defined_in(value, "bitsandbytes") else OUTSIDE
                for name, tensor in _inside(f"{prefix}.{attribute}".lstrip("."), value, seen):
                    yield Held(name, tensor, kind)


def _inside(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a tensor, a container, a module, or an object of qsvft's or bitsandbytes' own."""
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        yield name, value
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = enumerate(value)
    elif isinstance(value, (Tensor, nn.Module)) or _defined_in(value, "bitsandbytes", "qsvft"):
        children = getattr(value, "__dict__", {}).items()
    seen.add(id(value))
    for key, child in children:
        yield from _inside(f"{name}.{key}", child, seen)


def _defined_in(value: Any, *packages: str) -> bool:
    return type(value).__module__.partition(".")[0] in packages


def _vocabulary(model: nn.Module) -> set[int]:
    """The ids of embeddings and heads and of the modules inside of them."""
    found = [module for module in model.modules() if isinstance(module, (nn.Embedding, QuantizedModule))]
    return {id(part) for module in (*found, *vocabulary_of(model)) for part in module.modules()}


def _adapter_kind(name: str) -> str | None:
    """The kind of what an adapter adds, None for a tensor of the model itself."""
    if ".modules_to_save." in name:
        return WHOLE
    part = next((part for part in name.split(".") if part.startswith("qsvft_")), None)
    return None if part is None else _ADAPTERS.get(part, PATTERNS)


def _weight_kind(parameter: nn.Parameter, of_vocabulary: bool) -> str:
    if of_vocabulary:
        return VOCABULARY
    if parameter.dim() < 2:
        return SMALL
    return BASE if parameter.dim() == 2 else WEIGHTS
