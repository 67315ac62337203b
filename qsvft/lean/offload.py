"""Checkpoints on the CPU: what a forward keeps for its backward waits in host memory.

    forward     layer input --(copy)--> host           device bytes: layers x batch x tokens x width, gone
    backward    layer input <--(copy)-- host           two layers' inputs at a time: one in use, one ahead

With gradient checkpointing what is kept is each layer's input, 16 MiB a layer for 2048 tokens of width
4096. Without it whatever autograd keeps of the layers travels, which is far more and far slower.

The module that runs the layers (a model's decoder, say) gets a pair of hooks that put torch's
``saved_tensors_hooks`` around its forward. Weights and factors, which matrix products keep too, stay
where they are, and so does everything small or of whole numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from .host_memory import Away, Order, Transfer, unpack

MIN_BYTES = 2**20
_HOSTS = ("cpu",)
_ATTRIBUTE = "qsvft_offload"


def offload_checkpoints(model: nn.Module, min_bytes: int = MIN_BYTES) -> None:
    """Keep what the layers' forward saves for the backward in host memory, until :func:`stop_offloading`.

    Gradients stay bitwise the same. On CUDA the copies go through pinned memory on a stream of their own, in the
    backward one tensor ahead; on a CPU there is nothing to move and nothing is. Calling it again changes ``min_bytes``.

    Args:
        model: a transformers model, with adapters or without.
        min_bytes: smaller tensors stay on the device.

    Raises:
        ValueError: the model has no layers that transformers can checkpoint.
        RuntimeError: later, in a forward: something changed a tensor in place after autograd had saved it.
    """
    callers = list(_callers(model))
    if not callers:
        raise ValueError(
            f"{type(model).__name__}: found no layer that transformers can checkpoint (GradientCheckpointingLayer), "
            "expected a model whose decoder or encoder consists of them. Leave offload off."
        )
    stop_offloading(model)
    for caller in callers:
        handles = (
            caller.register_forward_pre_hook(_enter),
            caller.register_forward_hook(_leave, always_call=True),
        )
        setattr(caller, _ATTRIBUTE, _Offloading(min_bytes, handles))


def stop_offloading(model: nn.Module) -> None:
    """Undo :func:`offload_checkpoints`; what waits in host memory already is still fetched from there."""
    for module in model.modules():
        offloading = vars(module).get(_ATTRIBUTE)
        if offloading is not None:
            for handle in offloading.handles:
                handle.remove()
            delattr(module, _ATTRIBUTE)


def _callers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward calls the outermost checkpointed layers."""
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
    seen: set[int] = set()
    for name in layers:
        if any(name.startswith(f"{other}.") for other in layers):
            continue  # recomputed with the layer around it
        parent = modules[name.rpartition(".")[0]]
        while isinstance(parent, (nn.ModuleList, nn.ModuleDict)):  # these are never called
            name = name.rpartition(".")[0]
            parent = modules[name.rpartition(".")[0]]
        if id(parent) not in seen:
            seen.add(id(parent))
            yield parent


@dataclass
class _Offloading:
    """What a module that offloads carries: its threshold, its hooks, and the forwards that run, by thread."""

    min_bytes: int
    handles: tuple[RemovableHandle, ...]
    running: dict[int, list[tuple[saved_tensors_hooks, _Packer]]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model runs no forward yet."""
        return {**vars(self), "running": {}}

    def open(self, packer: _Packer) -> None:
        context = saved_tensors_hooks(packer, unpack)
        context.__enter__()
        self.running.setdefault(threading.get_ident(), []).append((context, packer))

    def close(self) -> None:
        """Leave the context, and that of an earlier forward which the keyboard interrupted: no hook is called then."""
        opened = self.running.pop(threading.get_ident(), [])
        for context, _ in reversed(opened):
            context.__exit__(None, None, None)
        for _, packer in opened:
            packer.release()


# Functions of the module alone: a bound method would close a reference cycle through the module, and
# would bind a copy of the model to the original.
def _enter(module: nn.Module, _: Any) -> None:
    offloading: _Offloading = vars(module)[_ATTRIBUTE]
    if torch.is_grad_enabled():
        offloading.open(_Packer(module, offloading.min_bytes))


def _leave(module: nn.Module, *_: Any) -> None:
    vars(module)[_ATTRIBUTE].close()


class _Packer:
    """Decides which saved tensors of a forward travel, sends them, and holds the last until its copy is waited for."""

    def __init__(self, module: nn.Module, min_bytes: int) -> None:
        self.min_bytes = min_bytes
        self.module = type(module).__name__
        # Storages: what a product keeps of a weight is a view of it.
        self.held = {id(t.untyped_storage()) for t in chain(module.parameters(), module.buffers())}
        self.order = Order()
        self.leaving: tuple[Transfer, int] | None = None

    def __call__(self, tensor: Tensor) -> Tensor | Away:
        if not self._travels(tensor):
            return tensor
        self.release()
        away = Away(tensor, self.order)
        self.leaving = away.leave(tensor), tensor._version
        return away

    def release(self) -> None:
        """Drop the tensor that was sent last, after the computing stream was told to wait for its copy."""
        leaving, self.leaving = self.leaving, None
        if leaving is not None and leaving[0].wait()._version != leaving[1]:
            raise RuntimeError(
                f"{self.module}: found a tensor changed in place after autograd had saved it, while it was copied to "
                "host memory; expected it unchanged, as torch does without offloading. Change a copy of it instead."
            )

    def _travels(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type in _HOSTS:
            return False
        if not tensor.is_floating_point() or tensor.nbytes < self.min_bytes:
            return False
        storage = tensor.untyped_storage()
        # A view of something larger would free nothing by going.
        return storage.nbytes() == tensor.nbytes and _fills_its_memory(tensor) and id(storage) not in self.held


def _fills_its_memory(tensor: Tensor) -> bool:
    """Whether each element has a place of its own, without gaps: an expanded tensor could not be copied into."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).is_contiguous()
