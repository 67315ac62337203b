"""Experts of a mixture, which transformers holds in parameters of three dimensions, (experts, outputs, inputs). Here
they stand as one linear layer for each, so that whatever is done to a linear layer is done to an expert.

    experts.gate_up_proj (E, 2 I, H)  ->  experts.gate_up_proj.0, ..., E linear layers of (2 I, H)

The layers look at the parameter's numbers and copy nothing. What a layer of experts computes is transformers' interface
for them (``use_experts_implementation``): the rows of each expert through its two layers, the gate of the class between
them, summed with the router's weights.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .disguise import disguised, undisguised
from .layer_as_stored import layer_as_stored
from .left_dense import under

_SAID = ("has_gate", "has_bias", "is_transposed")
"""What transformers' interface says of a class of experts."""


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's parameters of three dimensions that hold experts, in their order; none of another module.

    Experts that compute in their own way (Llama 4's) are no such module, nor are those of which this
    process holds some (``enable_expert_parallel``).
    """
    if not all(hasattr(module, name) for name in _SAID) or getattr(module, "_is_expert_parallel", False):
        return ()
    names = _leaves(module)
    held = dict(module.named_parameters(recurse=False))
    return names if all(name in held and held[name].dim() == 3 for name in names) else ()


def split_experts(model: nn.Module, skip: Collection[str] = (), only: Collection[str] | None = None) -> nn.Module:
    """Let linear layers stand where experts' parameters stood, in place.

    Args:
        model: any model, also one without values.
        skip: parts of names of modules to leave as they are.
        only: names of modules to split; None for all.

    Returns:
        The same model.
    """
    for name, module in list(model.named_modules()):
        names = expert_parameters(module) if only is None or name in only else ()
        if names and not under(name, skip):
            _split(module, names)
    return model


def join_experts(model: nn.Module) -> nn.Module:
    """Undo :func:`split_experts` wherever all linear layers are plain, in place."""
    for module in model.modules():
        plain = undisguised(module, _split_class)
        if plain is None or any(type(layer) is not nn.Linear for layer in _layers(module)):
            continue
        for name in _leaves(module):
            _join(module, name)
        module.__class__ = plain
        del module._is_hf_initialized
    return model


def is_split(module: nn.Module) -> bool:
    """Whether a module's experts are linear layers."""
    return undisguised(module, _split_class) is not None


def expert_layers(model: nn.Module) -> dict[str, str]:
    """The names of experts' linear layers, with that of the parameter in whose place each stands."""
    return {
        f"{parameter}.{number}": parameter
        for name, module in model.named_modules()
        if is_split(module)
        for leaf in _leaves(module)
        for number in range(len(getattr(module, leaf)))
        for parameter in [f"{name}.{leaf}" if name else leaf]
    }


def parameters_of_experts(model: nn.Module) -> list[str]:
    """The names of a model's parameters of experts, whether linear layers stand in their place or not."""
    found = []
    for name, module in model.named_modules():
        leaves = _leaves(module) if is_split(module) else expert_parameters(module)
        found += [f"{name}.{leaf}" if name else leaf for leaf in leaves]
    return found


def _leaves(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for name in _leaves(module):
        yield from getattr(module, name)


def _split(module: Any, names: Collection[str]) -> None:
    for name in names:
        W, b = getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
        layers = nn.ModuleList(_linear(W, b, number, module.is_transposed) for number in range(len(W)))
        delattr(module, name)
        if b is not None:
            delattr(module, f"{name}_bias")
        module.add_module(name, layers.train(module.training))
    plain: Any = type(module)
    module.__class__ = _split_class(plain)
    module._is_hf_initialized = True  # transformers would give numbers to parameters that are gone


def _linear(W: nn.Parameter, b: nn.Parameter | None, number: int, transposed: bool) -> nn.Module:
    values = W.detach()[number]
    new = layer_as_stored(values.t() if transposed else values, None if b is None else b.detach()[number])
    return new.requires_grad_(W.requires_grad)


def _join(module: Any, name: str) -> None:
    layers = list(getattr(module, name))
    delattr(module, name)
    weights = [layer.weight.detach() for layer in layers]
    held = {name: torch.stack([W.t() for W in weights] if module.is_transposed else weights)}
    if module.has_bias:
        held[f"{name}_bias"] = torch.stack([layer.bias.detach() for layer in layers])
    for leaf, values in held.items():
        module.register_parameter(leaf, nn.Parameter(values, requires_grad=layers[0].weight.requires_grad))


@functools.cache
def _split_class(plain: Any) -> type:
    """The subclass of a class of experts that computes with linear layers."""

    # The signature of transformers' interface.
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _mixture(self, hidden_states, top_k_index, top_k_weights)

    return disguised(plain, _split_class, forward)


def _mixture(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """y of each row: the sum of w_j expert_j(x) over its k experts.

    Args:
        module: the experts.
        hidden_states: x (rows, H).
        top_k_index: (rows, k), each row's experts; a number that no expert has stands for none.
        top_k_weights: w (rows, k).
    """
    inward, outward = (getattr(module, name) for name in _leaves(module))
    rows, k = top_k_index.shape
    number, order = top_k_index.reshape(-1).sort(stable=True)
    counts = _counts(number, len(inward))
    found = []
    # In training every expert takes part, if with no row: each process of several has the same gradients to add up.
    every = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    for expert, x in enumerate(hidden_states[order[: sum(counts)] // k].split(counts)):
        if len(x) or every:
            inner = inward[expert](x)
            found.append(outward[expert](module._apply_gate(inner) if module.has_gate else module.act_fn(inner)))
    if not found:
        return torch.zeros_like(hidden_states)
    y = torch.cat(found)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    if none := len(order) - len(y):
        y = torch.cat([y, y.new_zeros(none, y.shape[-1])])
    weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[order.argsort()].view(rows, k, -1).sum(dim=1).to(hidden_states.dtype)


def _counts(number: Tensor, experts: int) -> list[int]:
    """How many rows each expert gets; without values as many as any other."""
    if number.is_meta:
        return evenly(len(number), experts)
    counts: list[int] = torch.bincount(number, minlength=experts)[:experts].tolist()
    return counts


def evenly(rows: int, experts: int) -> list[int]:
    """Rows spread over experts."""
    each, more = divmod(rows, experts)
    return [each + (expert < more) for expert in range(experts)]
