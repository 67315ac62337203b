"""Leaner activations: frozen normalisation layers keep their input, not the fp32 copies they compute with.

An RMSNorm of transformers keeps its input in fp32 for the backward, 4 bytes an entry beside the 2 of the
input that is alive anyway. Here it keeps the input alone and computes itself again in the backward; the
same operations on the same numbers, so neither outputs nor gradients change by a bit. A long sequence it takes tile by
tile, so that the fp32 copies stand there of 2048 tokens alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..storage.disguise import disguised, undisguise, undisguised
from .by_tiles import by_tiles
from .same_autocast import Autocast, again


def lean_norms(model: nn.Module) -> nn.Module:
    """Let a model's frozen normalisation layers keep their input alone, in place.

    Args:
        model: any model. Layers count by their class's name (``...RMSNorm``, ``...LayerNorm``); a layer whose
            weight trains computes as before.

    Returns:
        The same model.
    """
    for module in model.modules():
        if _is_norm(module) and undisguised(module, _lean_class) is None:
            plain: Any = type(module)
            module.__class__ = _lean_class(plain)
    return model


def plain_norms(model: nn.Module) -> nn.Module:
    """Undo :func:`lean_norms`."""
    return undisguise(model, _lean_class)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not list(module.children())


@functools.cache
def _lean_class(plain: Any) -> type:
    """The subclass of a norm's class that keeps its input alone."""

    @functools.wraps(plain.forward)
    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _may_be_lean(self, x):
            return plain.forward(self, x, *args, **kwargs)
        return _Recomputed.apply(x, self, plain.forward)

    return disguised(plain, _lean_class, forward)


def _may_be_lean(module: nn.Module, x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and x.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not any(p.requires_grad for p in module.parameters())
    )


class _Recomputed(torch.autograd.Function):
    """forward(module, x), keeping x; the backward runs the forward again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, run: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.run, ctx.autocast = module, run, Autocast.of(x)
        return by_tiles(x, lambda tile: run(module, x[tile]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again, through x itself
            return _gradient(ctx, x, g, twice=True), None, None
        return by_tiles(x, lambda tile: _gradient(ctx, x[tile].detach().requires_grad_(), g[tile])), None, None


def _gradient(ctx: Any, x: Tensor, g: Tensor, twice: bool = False) -> Tensor:
    with torch.enable_grad(), again(ctx.autocast):
        y = ctx.run(ctx.module, x)
    return torch.autograd.grad(y, x, g, create_graph=twice)[0]
