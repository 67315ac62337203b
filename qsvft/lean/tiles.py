"""An MLP taken in tiles over tokens: what it computes inside stands there of one tile at a time.

    forward     y[t] = MLP(x[t])                                      kept: x, (tokens, width)
    backward    MLP(x[t]) again; dL/dx[t], and dL/dM summed over t    live: (tile, inner width), a few times

An MLP acts on each token by itself, so the same is computed; sums over tokens are taken tile by tile. In a layer that
is checkpointed it takes no product more: the layer's recomputation ends with what its last part keeps, which is x, and
each tile is computed again where it is needed. Without checkpointing it is a checkpoint of the MLP. (Tiles over tokens
are those of Arctic's long sequence training, arXiv 2506.13996.)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..maths.coefficients import keep
from ..storage.disguise import disguised, undisguise, undisguised
from .by_tiles import by_tiles, fits_a_tile, tiles
from .same_autocast import Autocast, again

_NAMES = ("MLP", "FeedForward")


def tile_mlps(model: nn.Module) -> nn.Module:
    """Let a model's MLPs take more than 2048 tokens in tiles while they train, in place.

    Args:
        model: a transformers model, with adapters or without. MLPs count by their class's name (``...MLP``,
            ``...FeedForward``); one with dropout computes as before.

    Returns:
        The same model.

    Raises:
        ValueError: it has no such MLP.
    """
    found = False
    for module in model.modules():
        if type(module).__name__.endswith(_NAMES) and list(module.children()):
            found = True
            if undisguised(module, _tiled_class) is None:
                plain: Any = type(module)
                module.__class__ = _tiled_class(plain)
    if not found:
        raise ValueError(
            f"{type(model).__name__}: found no MLP, expected modules whose class is called "
            f"{' or '.join(f'...{name}' for name in _NAMES)}. Leave tile_mlp off."
        )
    return model


def whole_mlps(model: nn.Module) -> nn.Module:
    """Undo :func:`tile_mlps`."""
    return undisguise(model, _tiled_class)


@functools.cache
def _tiled_class(plain: Any) -> type:
    """The subclass of an MLP's class that takes tokens in tiles."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not _may_be_tiled(self, args[0]):
            return plain.forward(self, *args, **kwargs)
        return _Tiled.apply(keep(args[0]), self, plain.forward, *_trained(self))

    return disguised(plain, _tiled_class, forward)


def _may_be_tiled(mlp: nn.Module, x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and not fits_a_tile(x)
        and x.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in mlp.modules())
    )


def _trained(mlp: nn.Module) -> list[Tensor]:
    """What trains in it."""
    for part in mlp.modules():
        if isinstance(part, FullyShardedDataParallel) or any(_is_view(one) for one in vars(part).values()):
            raise RuntimeError(
                f"{type(mlp).__name__}: tile_mlp found parameters that FSDP1 holds as parts of others, which get their "
                "gradients once a step alone. Set fsdp_version: 2 in the launcher's config, or leave tile_mlp off."
            )
    return [parameter for parameter in mlp.parameters() if parameter.requires_grad]


def _is_view(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _Tiled(torch.autograd.Function):
    """run(mlp, x) tile by tile; the backward runs each again. x is kept by the node before this."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: nn.Module, run: Any, *trained: Tensor) -> Tensor:
        ctx.kept, ctx.mlp, ctx.run, ctx.autocast = x.grad_fn, mlp, run, Autocast.of(x)
        ctx.set_materialize_grads(False)
        rows = x.detach()  # of x itself a tile would ask for gradients that nothing here records
        return by_tiles(rows, lambda tile: run(mlp, rows[tile]))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        (x,) = ctx.kept.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again, through x itself
            with again(ctx.autocast):
                y = ctx.run(ctx.mlp, x)
            found = torch.autograd.grad(y, [x, *_trained(ctx.mlp)], g, create_graph=True, allow_unused=True)
            return found[0], None, None, *found[1:]
        grad_x = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * len(ctx.needs_input_grad[3:])
        for tile in tiles(x):
            leaf = x[tile].detach().requires_grad_()
            with torch.enable_grad(), again(ctx.autocast):
                y = ctx.run(ctx.mlp, leaf.view_as(leaf))  # hooks on a module's input, as some have, want a node
            of_x, *of_trained = torch.autograd.grad(y, [leaf, *_trained(ctx.mlp)], g[tile], allow_unused=True)
            grad_x[tile] = of_x
            sums = [_sum(total, one) for total, one in zip(sums, of_trained, strict=True)]
        return grad_x, None, None, *sums


def _sum(total: Tensor | None, one: Tensor | None) -> Tensor | None:
    if total is None or one is None:
        return one if total is None else total
    return total.add_(one)
