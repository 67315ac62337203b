"""A saved adapter as a LoRA, its layers read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from ..maths.low_rank import Spectrum
from ..options.choices import RANKS
from ..storage.factors import frobenius_norm
from ..storage.quantization import linear_names
from ..tuner.layer import QSVFTLinear
from ..tuner.lora_factors import lora_factors
from ..tuner.one_by_one import ADAPTER, SavedAdapter
from .base import Base
from .exported import Exported
from .lora import PREFIX, fit_lora, lora_config, lora_tensors, write_lora


def export_lora(
    saved: SavedAdapter, base: Base, rank: int | None, onto: str, dtype: torch.dtype, folder: Path, progress: bool
) -> Exported:
    """Write it; see :func:`qsvft.export`.

    Raises:
        ValueError: the adapter does not fit its base, or is none that a server takes.
    """
    names = saved.names
    if onto == "held" and base.bits != 16 and (expert := next((name for name in names if name in base.experts), None)):
        raise ValueError(
            f"{expert}: is an expert of a base in {base.bits} bits, as only qsvft holds experts; expected a base that "
            "other programs load. Use onto='original' (--onto original), or format='dense'."
        )

    def rule(name: str, k: int, _: Spectrum) -> int:
        if rank is None and k > RANKS[-1]:
            raise ValueError(
                f"{name}: its M acts on {k} directions, and servers take LoRA of at most {RANKS[-1]}; expected "
                f"rank= one of {', '.join(map(str, RANKS))}, or format='dense'."
            )
        return k if rank is None else min(k, rank)

    def layers() -> Iterator[tuple[str, QSVFTLinear]]:
        every = saved.layers(base.layer, base.factors)
        for name, layer in tqdm(every, total=len(names), desc="exporting", unit="layer", disable=not progress):
            if onto == "original" and base.original is not None:
                W = base.original_weight(name).float()
                B, A = lora_factors(layer, ADAPTER, given_back=False)
                moved = W + B @ A - layer.merged_weight([ADAPTER])
                moves.append((float(frobenius_norm(moved)), float(frobenius_norm(W))))
            yield name, layer

    moves: list[tuple[float, float]] = []
    fit = fit_lora(layers(), ADAPTER, rule, dtype, onto == "held")
    for moved, weight in moves:
        fit.errors.add_move(moved, weight)
    chosen = rank or next(one for one in RANKS if one >= fit.most)
    linear = {name: isinstance(base.model.get_submodule(name), Conv1D) for name in linear_names(base.model)}
    config = lora_config(saved.config, fit, chosen, linear, base.experts)
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in lora_tensors(fit, chosen, base.experts).items()}
    write_lora(folder, {**saved.trained_whole, **tensors}, config)
    return fit.found(folder, chosen, onto, dtype)
