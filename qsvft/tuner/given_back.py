"""What rounding took from a layer along the directions of its data, for the adapter to give back (``residual=True``).

    E = (W - the weight as held) V              (m, k), frozen
    y = (W as held) x + E Vᵀ x + U M Vᵀ x       for x in the span of V: W x as before rounding, to the rounding of E

V holds the leading directions of the inputs, so that this is most of what rounding does to the outputs. LQER (arXiv
2402.02446) and QERA (arXiv 2410.06040) choose a low-rank correction from the same second moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..storage.basis_key import BasisKey
from ..storage.factors import StoredBasis
from ..storage.stored_matrix import StoredMatrix
from ..storage.weights import weight_as_held
from .adapted import AdaptedLinear
from .config import QSVFTConfig
from .progress import progress_shown
from .sources import DataDirections
from .targets import rank_of, shape_of


def what_rounding_took(
    layers: Mapping[str, nn.Module],
    directions: DataDirections,
    config: QSVFTConfig,
    weights: Iterable[tuple[str, Tensor]],
) -> dict[tuple[str, BasisKey], StoredBasis]:
    """E of every layer, as k rows of R^m in ``factor_bits``, on the CPU.

    Args:
        layers: by their names, rounded.
        directions: with V of each.
        config: of the adapter.
        weights: names with the weights (m, n) before they were rounded, one at a time; others are passed over.

    Raises:
        ValueError: a layer's weight is missing, or of another shape.
    """
    bits, errors = config.stored_bits, {}
    shown = {"desc": "measuring what rounding took", "unit": "matrix", "leave": False, "disable": not progress_shown()}
    for name, W in tqdm(weights, total=len(layers), **shown):
        if name not in layers:
            continue
        shape = shape_of(layers[name], name)
        if tuple(W.shape) != shape:
            raise ValueError(f"{name}: its weight before it was quantised has shape {tuple(W.shape)}, expected {shape}")
        held, rank = _held(layers[name], shape[1]), rank_of(config, name, shape)
        V = directions.basis(name, BasisKey.data("V", bits, rank), rank, shape[1], held.device)
        assert V is not None
        rows = V.dense(torch.float32) @ (W.to(held.device).float() - held.float()).t()
        errors[name, BasisKey.data("E", bits, rank)] = StoredBasis(StoredMatrix.hold(rows.cpu(), bits))
    known = {name for name, _ in errors}
    missing = [name for name in layers if name not in known]
    if missing:
        raise ValueError(
            f"{missing[0]}: residual=True wants its weight before it was quantised, found none among those given "
            f"({len(missing)} of {len(layers)} such). Give them all, or residual=False."
        )
    return errors


def _held(layer: nn.Module, size: int) -> Tensor:
    return layer.original_weight() if isinstance(layer, AdaptedLinear) else weight_as_held(layer)
