"""Where an adapter's factors are looked up before they are computed: in its own file, then beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..storage.factor_files import FactorFiles, FactorSource
from ..storage.factors import StoredBasis
from .probe import SIZE, TOLERANCE, relative_difference, weight_sketch


@dataclass(frozen=True)
class Sources:
    """The sources for one adapter.

    Attributes:
        own: the file of a self-contained adapter.
        given: a prepared directory, or what else was given for the model.
    """

    own: FactorFiles | None = None
    given: FactorSource | None = None

    def look_up(
        self, owner: str, sizes: Mapping[str, int], rank: int, bits: int, device: torch.device
    ) -> tuple[FactorSource | None, dict[str, StoredBasis]]:
        """The first source that has every basis of a form, and the bases by their keys.

        Args:
            owner: module name of the layer, or of the parent of the layers that share the basis.
            sizes: the length of a direction, for each key.
            rank: k.
            bits: 16, 8 or 4, how they have to be held.
            device: where they are put.

        Raises:
            ValueError: a basis that is held otherwise, or is damaged.
        """
        for source in (self.own, self.given):
            if source is None:
                continue
            found = {key: source.basis(owner, key, rank, size, device) for key, size in sizes.items()}
            bases = {key: basis for key, basis in found.items() if basis is not None}
            for key, basis in bases.items():
                if basis.stored.bits != bits:
                    raise ValueError(
                        f"{owner}: the stored basis {key} is held in {basis.stored.bits} bits, expected {bits}. "
                        "The file is damaged: copy it again, or make it again."
                    )
                basis.came_from = source
            if len(bases) == len(sizes):
                return source, bases
        return None, {}

    def own_bases(
        self, layer: str, sizes: Mapping[str, int], rank: int, bits: int, device: torch.device
    ) -> dict[str, StoredBasis] | None:
        """The bases that the adapter brings along, by their sides; for the rest see :meth:`look_up`."""
        source, bases = Sources(self.own).look_up(layer, sizes, rank, bits, device)
        return {key[0]: basis for key, basis in bases.items()} if source is not None else None

    def check_weight(self, layer: str, key: str, weight: Tensor) -> None:
        """Refuse the adapter's own factors on another weight than theirs, before anything is made of them.

        Args:
            layer: its module name.
            key: of the basis that it reads through.
            weight: (m, n) dense.

        Raises:
            ValueError: the weight differs by more than the probe would allow.
        """
        if self.own is None or weight.is_meta:
            return
        expected = self.own.sketch(layer, key, SIZE)
        difference = relative_difference(weight_sketch(weight).cpu(), expected)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{layer}: this adapter does not fit the base model: the weight that its factors are of differs by "
                f"{difference:.3g} from that here (expected at most {TOLERANCE}). Load it on the same checkpoint with "
                "the same bits and quantisation settings. For a new adapter with its config on another model make "
                "the config anew: QSVFTConfig(**config.to_dict())."
            )


NOWHERE = Sources()
