"""A module that trains whole beside M, a head for example, takes its input in its own dtype.

TRL casts what trains to bf16 where the base is in 4 bits. M stays fp32 (:mod:`qsvft.tuner.parameter`) and computes in
the dtype of its input; a head does not, and in an fp32 model would be handed what it cannot multiply with.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


def cast_inputs(model: nn.Module) -> None:
    """Let every such module of a model cast its input, if it has to; calling it again does nothing."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and not getattr(module, "qsvft_casts", False):
            module.register_forward_pre_hook(_in_own_dtype)
            module.qsvft_casts = True


def _in_own_dtype(wrapper: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    modules = [wrapper.modules_to_save[name] for name in active if name in wrapper.modules_to_save]
    held = [p for module in modules for p in module.parameters() if p.is_floating_point()]
    if len({p.dtype for p in held}) != 1 or _in_autocast(held[0].device.type):
        return None
    return tuple(one.to(held[0].dtype) if isinstance(one, Tensor) and one.is_floating_point() else one for one in args)


def _in_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
