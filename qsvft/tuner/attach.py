"""What a config asks of one layer when an adapter is attached: the pattern of its M, and a residual base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn

from ..maths import patterns
from ..maths.basis import Basis
from ..maths.decomposition import chosen_method
from ..storage.factors import StoredBasis
from ..storage.residual import ResidualLinear, residual_linear
from .config import QSVFTConfig
from .form import Form
from .targets import shape_of


def choose_pattern(
    config: QSVFTConfig, form: Form, rank: int, weight: Tensor, basis: Callable[[str], Basis], module_name: str
) -> patterns.Pattern:
    """The entries of M that train.

    Args:
        config: the adapter's config.
        form: its form on this layer.
        rank: k.
        weight: (m, n) dense; on meta the pattern has no values.
        basis: gives the layer's bases by key.
        module_name: the layer's name, part of the random pattern's seed.
    """
    d = min(config.off_diagonals, rank - 1)
    if config.pattern == "plain":
        return patterns.plain(rank)
    if config.pattern == "banded":
        return patterns.banded(rank, d)
    if config.pattern == "dense":
        return patterns.DensePattern(rank)
    if weight.is_meta:
        return patterns.IndexPattern.without_values(rank, patterns.banded_count(rank, d))
    if config.pattern == "random":
        return patterns.random_entries(rank, d, f"{config.seed}:{module_name}")
    return patterns.top_entries(*_both_factors(form, rank, weight.double(), basis), d)


def _both_factors(form: Form, rank: int, W: Tensor, basis: Callable[[str], Basis]) -> tuple[Tensor, Tensor]:
    """U and V for choosing entries; a factor that is not held follows from W: u_j = W v_j / |W v_j|."""
    inward = basis(form.inward).dense(torch.float64, rank)
    if form.kind == "both":
        return basis(form.outward).dense(torch.float64, rank), inward
    other = nn.functional.normalize(inward @ (W.T if form.kind == "input" else W), dim=1)
    return (other, inward) if form.kind == "input" else (inward, other)


# Without the decorator what is made here would lose its values with PEFT's low_cpu_mem_usage.
@skip_init_on_device  # type: ignore[untyped-decorator]
def residual_base(
    base: nn.Module,
    rank: int,
    config: QSVFTConfig,
    module_name: str,
    adapters: Sequence[str],
    bases: Mapping[str, StoredBasis] | None = None,
) -> ResidualLinear:
    """A residual base for a dense one; one that is there already, if it is the one asked for.

    Args:
        base: the layer's base.
        rank: k.
        config: the adapter's config.
        module_name: the layer's name, for messages.
        adapters: the adapters that the layer carries already.
        bases: "U" and "V", where the adapter brings them along.

    Raises:
        ValueError: the residual base is of another rank, of other bits or decomposed otherwise; a dense base carries
            adapters.
    """
    bits, method = config.stored_bits, chosen_method(min(shape_of(base, module_name)), rank, str(config.decomposition))
    if isinstance(base, ResidualLinear):
        held = base.basis("U")
        if (held.rank, held.stored.bits) != (rank, bits):
            raise ValueError(
                f"{module_name}: its residual base has rank {held.rank} and factor_bits={held.stored.bits}, the new "
                f"adapter asks for rank {rank} and factor_bits={bits}; expected the same. Load the model again for "
                "another residual base."
            )
        if base.method != method:
            raise ValueError(
                f"{module_name}: its residual base was made with decomposition={base.method.name!r}, the new adapter "
                f"asks for {method.name!r}; expected the same. Load the model again for another residual base."
            )
        return base
    if adapters:
        raise ValueError(
            f"{module_name}: residual=True changes the base, which carries the adapters {adapters} already; expected a "
            "base without any. Add the adapter with residual=True first."
        )
    return residual_linear(base, rank, bits, method, bases)
