"""What an adapted layer holds, and what others may ask of it: its weight, its bases, each adapter's form and M.

The layer itself (:mod:`qsvft.tuner.layer`) computes with this; what attaches, saves and counts reads it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..maths import patterns
from ..storage.basis_key import BasisKey
from ..storage.factor_files import FactorSource
from ..storage.factors import StoredBasis
from ..storage.nf4_product import slice_products
from ..storage.packed import is_packed
from ..storage.weights import weight_as_held
from .config import QSVFTConfig
from .form import Form
from .parameter import check_finite, with_coefficients
from .read_weight import ReadWeight


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A linear layer that holds bases, once for all adapters that agree on them, and each adapter's M.

    Args:
        base_layer: the layer that is adapted.
        module_name: its name in the model, for messages and for the random pattern's seed.
        shape: (outputs, inputs).

    Attributes:
        settings: the config of each adapter.
        forms: which map it uses, and the keys of its bases.
        units: the alpha that multiplies M, see :func:`~qsvft.maths.updates.unit_of`.
        came_from: the source that its factors were read from; None where they were computed.
        base_digest: SHA-256 of the base weight as stored.
        merged_adapters: the names of those that are in the weight now.
    """

    adapter_layer_names = ("qsvft_M",)
    other_param_names = ("qsvft_pattern", "qsvft_probe", "qsvft_scale", "settings", "forms", "units", "came_from")

    cast_input_dtype_enabled = True  # PEFT's disable_input_dtype_casting sets it; inputs are cast nowhere here

    base_layer: nn.Module
    # BaseTunerLayer's, for the type checker.
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    get_base_layer: Callable[[], nn.Module]

    def __init__(self, base_layer: nn.Module, module_name: str, shape: tuple[int, int]) -> None:
        super().__init__()
        self.base_layer = slice_products(base_layer)
        self.module_name = module_name
        self.out_features, self.in_features = shape
        self.settings: dict[str, QSVFTConfig] = {}
        self.forms: dict[str, Form] = {}
        self.units: dict[str, float] = {}
        self.came_from: dict[str, FactorSource | None] = {}
        self.qsvft_M = nn.ModuleDict()
        self.qsvft_pattern = nn.ModuleDict()
        self.qsvft_probe = BufferDict({}, persistent=True)
        # Not persistent, so that PEFT does not save them; not keyed by adapter, so that it does not upcast them.
        self.qsvft_bases = nn.ModuleDict()
        self.qsvft_scale = BufferDict({}, persistent=False)
        self._expected_probe: dict[str, Tensor] = {}
        self._verified: set[str] = set()
        self._loads = 0
        self.base_digest: bytes = b""
        self.merged_adapters: list[str] = []
        self._unmerged: list[nn.Module] = []  # in a list: it is not part of the module tree
        self.register_load_state_dict_pre_hook(_before_loading)

    def M(self, adapter: str) -> nn.Parameter:  # noqa: N802 - the paper's name
        """The entries of an adapter's M, in its pattern's order."""
        held: Any = self.qsvft_M[adapter]  # Coefficients, or FSDP's wrapper of them
        values: nn.Parameter = held.weight
        return values

    def check_finite(self, adapter: str) -> None:
        """Refuse an M that holds NaN or Inf."""
        check_finite(self.module_name, adapter, self.M(adapter))

    def pattern(self, adapter: str) -> patterns.Pattern:
        """The pattern of an adapter."""
        pattern = self.qsvft_pattern[adapter]
        assert isinstance(pattern, patterns.Pattern)
        return pattern

    def basis(self, key: str) -> StoredBasis:
        """A basis that this layer holds."""
        basis = self.qsvft_bases[key]
        assert isinstance(basis, StoredBasis)
        return basis

    def held_bases(self) -> dict[BasisKey, StoredBasis]:
        """Every basis that this layer holds, by its key."""
        return {BasisKey(key): self.basis(key) for key in self.qsvft_bases}

    @property
    def device(self) -> torch.device:
        """Where the adapters' tensors belong."""
        held = next((b for basis in self.qsvft_bases.values() for b in basis.buffers()), None)
        return held.device if held is not None else next(self.base_layer.parameters()).device

    @property
    def weight(self) -> Tensor:
        """The base layer's; while an adapter acts beside it, one that refuses to be multiplied with."""
        held: Tensor = super().weight
        acts = not (self.disable_adapters or self.merged) and any(name in self.qsvft_M for name in self.active_adapters)
        if not acts or is_packed(self.get_base_layer()) or torch.compiler.is_compiling():
            return held
        return ReadWeight.of(held, self.module_name)

    def verify_again(self, adapter: str) -> None:
        """Before an adapter is used the next time its probe is compared, in a compiled graph as well."""
        self._verified.discard(adapter)
        self._loads += 1

    def original_base(self) -> nn.Module:
        """The base layer without any merged adapter."""
        return self._unmerged[0] if self._unmerged else self.get_base_layer()

    def original_weight(self) -> Tensor:
        """The base weight (m, n) as held, dense and without merged adapters."""
        return weight_as_held(self.original_base())


def _before_loading(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Whatever door a state comes through: M by the names that it had, finite, and on this base before it is used."""
    assert isinstance(layer, AdaptedLinear)
    for key in [key for key in state_dict if key.startswith(f"{prefix}qsvft_M.")]:
        M = state_dict[with_coefficients(key)] = state_dict.pop(key)
        check_finite(layer.module_name, key.removeprefix(f"{prefix}qsvft_M.").removesuffix(".weight"), M)
    for adapter in list(layer._verified):
        layer.verify_again(adapter)
