"""The linears of a built model, and what each of them is in the words of parts.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
from parts import Linear
from peft.tuners.lora import LoraLayer
from torch import nn

from qsvft.maths.patterns import BandedPattern, DensePattern
from qsvft.memory.factored import FactoredLinear
from qsvft.storage.residual import ResidualLinear
from qsvft.tuner.layer import QSVFTLinear

ADAPTER = "default"


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every adapted linear of a model, with its name; for a model without any, none."""
    for name, module in model.named_modules():
        if isinstance(module, QSVFTLinear | FactoredLinear | LoraLayer):
            yield name, module


def described(layer: Any) -> Linear:
    """What a layer is.

    Raises:
        ValueError: a form whose parts are not written down: another pattern, or a residual base.
    """
    if isinstance(layer, FactoredLinear):
        (m, k), n = layer.U.shape, layer.V.shape[1]
        return Linear(m, n, "rebuilt" if layer.rebuild else "factored", k, card=layer.U.is_cuda)
    base = layer.get_base_layer()
    bits = 4 if isinstance(base, bnb.nn.Linear4bit) else 16
    if isinstance(layer, LoraLayer):
        return Linear(layer.out_features, layer.in_features, "lora", layer.r[ADAPTER], base_bits=bits)
    pattern, form = layer.pattern(ADAPTER), layer.forms[ADAPTER]
    if isinstance(base, ResidualLinear) or not isinstance(pattern, BandedPattern | DensePattern):
        found = type(base if isinstance(base, ResidualLinear) else pattern).__name__
        raise ValueError(f"{layer.module_name}: found {found}; expected a dense or banded M on a base of its own")
    return Linear(
        layer.out_features,
        layer.in_features,
        form.kind,
        pattern.rank,
        "dense" if isinstance(pattern, DensePattern) else "banded",
        0 if isinstance(pattern, DensePattern) else pattern.off_diagonals,
        bits,
        layer.basis(form.inward).stored.bits,
        form.error is not None,
        layer.M(ADAPTER).is_cuda,
    )
