"""What quantising leaves dense: said where it is much, refused where it is everything."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MUCH = 0.05
"""Of the numbers beside the vocabulary, above which what stays dense is said."""

_NAMED = 3


def report_dense(model: nn.Module, targets: Sequence[str], asked: Collection[str], bits: int) -> None:
    """Say how much stays dense beside the layers that will be quantised.

    Args:
        model: before it is quantised.
        targets: the names of the layers that will be.
        asked: names, or parts of names, of what is to stay dense, which is not counted.
        bits: 4 or 8.

    Raises:
        ValueError: there is nothing to quantise, and that was not asked for.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    vocabulary = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    quantised = {name: model.get_parameter(f"{name}.weight") for name in targets}
    others = {id(p) for p in quantised.values()} | {id(p) for m in vocabulary for p in m.parameters(recurse=False)}
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    left = {
        name: p
        for name, p in model.named_parameters()
        if p.dim() > 1 and p.is_floating_point() and id(p) not in others and not under(name, asked)
    }
    numbers = sum(p.numel() for p in left.values())
    if not targets:
        if asked:
            return
        raise ValueError(
            f"{type(model).__name__}: expected linear layers to quantise to {bits} bits, found none (weights of "
            f"{numbers:,} numbers in {_kinds(left, owners)}). Use bits=16, which leaves the model as it is."
        )
    total = numbers + sum(p.numel() for p in quantised.values())
    if numbers > MUCH * total:
        most = sorted(left, key=lambda name: -left[name].numel())[:_NAMED]
        size = sum(p.numel() * p.element_size() for p in left.values())
        logger.warning(
            "%s: %.0f %% of the weights beside the vocabulary stay dense, %s, since they are no linear layers of their "
            "own, or their parent reads them itself: %d tensors in %s, such as %s",
            type(model).__name__,
            100 * numbers / total,
            f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB",
            len(left),
            _kinds(left, owners),
            ", ".join(most),
        )


def _kinds(left: dict[str, nn.Parameter], owners: dict[int, nn.Module]) -> str:
    return ", ".join(sorted({type(owners[id(p)]).__name__ for p in left.values()})) or "nothing"


def under(name: str, parts: Collection[str]) -> bool:
    """Whether one of the dotted parts stands in the dotted name, whole components only."""
    return any(f".{part}." in f".{name}." for part in parts)
