"""The bases of a layer: those that it holds already, those that are stored somewhere, or new ones.

A layer holds a basis once for all adapters that agree on it, under the key of :mod:`qsvft.tuner.form`. Stored
directions that are others than those held under that key (another machine's signs, say) stand beside them, under
key@1, key@2. So do those that an adapter brings along, unless they are the same bit for bit: an adapter without
any means those of its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from ..maths.decomposition import Sides
from ..storage.basis_key import BasisKey
from ..storage.factor_files import FactorSource
from ..storage.factors import StoredBasis, make_bases
from ..storage.residual import ResidualLinear
from ..storage.stored_matrix import StoredMatrix
from .adapted import AdaptedLinear
from .config import QSVFTConfig
from .form import Form
from .sources import Sources


def hold_bases(
    layer: AdaptedLinear, form: Form, weight: Tensor, rank: int, config: QSVFTConfig, sources: Sources
) -> tuple[Form, FactorSource | None]:
    """Let a layer hold at least ``rank`` directions of the bases of a form; directions held stay as they are.

    Args:
        layer: where they are held.
        form: with the keys that its config means.
        weight: (m, n) dense.
        rank: k.
        config: the adapter's config.
        sources: where to look before they are computed.

    Returns:
        The form with the keys under which they are held, and the source that they are from, if any.
    """
    if config.residual_base:
        base = layer.original_base()
        assert isinstance(base, ResidualLinear)
        if sources.own is not None and sources.own.rank(layer.module_name, form.inward):
            sources.check_weight(layer.module_name, form.inward, weight)
        layer.qsvft_bases.update({form.inward: base.basis("V"), form.outward: base.basis("U")})
        return form, None
    held, (m, n) = layer.held_bases(), weight.shape
    source, found = sources.look_up(layer.module_name, form.sizes((m, n)), rank, config.stored_bits, weight.device)
    if source is not None and source is sources.own:
        sources.check_weight(layer.module_name, form.inward, weight)
    new = found if source is not None else _computed(layer.module_name, form, weight, rank, config, held)
    names = {key: key for key in form.keys}
    for key, basis in new.items():
        names[key] = _place(held, key, basis, source is None or source is not sources.own)
    layer.qsvft_bases.update({name: held[name] for name in names.values()})
    error = None if form.error is None else names[form.error]
    return replace(form, inward=names[form.inward], outward=names[form.outward], error=error), source


def _computed(
    layer: str,
    form: Form,
    weight: Tensor,
    rank: int,
    config: QSVFTConfig,
    held: Mapping[BasisKey, StoredBasis],
) -> dict[BasisKey, StoredBasis]:
    """Those of the bases of which less than ``rank`` directions are held, anew."""
    missing = [key for key in form.keys if key not in held or held[key].rank < rank]
    if not missing:
        return {}
    if config.basis == "data" and not weight.is_meta:
        raise ValueError(
            f"{layer}: basis='data' needs directions that come from batches of data, found none of rank {rank} "
            "for it. Give prepare() calibration=batches, or call qsvft.calibrate(model, config, batches) before the "
            "adapter is attached."
        )
    sides: Sides = "both" if form.kind == "both" else "one"
    made = make_bases(weight, rank, sides, config.stored_bits, form.method)
    if form.error is not None:  # on meta alone: of real ones there is a source
        made["E"] = StoredBasis(StoredMatrix.hold(weight.new_empty(rank, weight.shape[0]), config.stored_bits))
    return {key: made[key.side] for key in missing}


def _place(held: dict[BasisKey, StoredBasis], key: BasisKey, basis: StoredBasis, may_take_key: bool) -> BasisKey:
    """Put a basis among those held; the name under which it is."""
    for name, other in held.items():
        if name.plain == key and _agree(other, basis):
            _extend(other, basis)
            return name
    beside = (key.beside(number) for number in count(1))
    name = key if may_take_key and key not in held else next(name for name in beside if name not in held)
    held[name] = basis
    return name


def _agree(held: StoredBasis, other: StoredBasis) -> bool:
    """Whether the directions that both have are the same: from one source, computed here both, or bit for bit."""
    if held.came_from is other.came_from:
        return True
    rank = min(held.rank, other.rank)
    pairs = zip(held.stored.parts(0, rank), other.stored.parts(0, rank), strict=True)
    return all(torch.equal(a.to(b.device), b) for a, b in pairs)


def _extend(held: StoredBasis, longer: StoredBasis) -> None:
    if held.rank < longer.rank:
        held.extend(longer)
        if held.came_from is not longer.came_from:
            held.came_from = None
