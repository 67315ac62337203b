"""Where an adapter's factors are looked up before they are computed: in its own file, then beside the model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..storage.basis_key import BasisKey
from ..storage.factor_files import FactorFiles, FactorSource
from ..storage.factors import StoredBasis
from .config import QSVFTConfig
from .probe import SIZE, TOLERANCE, relative_difference, weight_sketch


class DataDirections:
    """Directions in memory that came from data: what :func:`~qsvft.tuner.calibration.calibrate` leaves on a model.

    Args:
        bases: by layer and key.
        lengths: by layer, what takes the place of |W|_F in alpha.
    """

    def __init__(self, bases: Mapping[tuple[str, BasisKey], StoredBasis], lengths: Mapping[str, float]) -> None:
        self._bases, self.lengths = dict(bases), dict(lengths)

    def add(self, bases: Mapping[tuple[str, BasisKey], StoredBasis]) -> None:
        """Hold some more."""
        self._bases.update(bases)

    def basis(self, layer: str, key: BasisKey, rank: int, size: int, device: torch.device) -> StoredBasis | None:
        """``rank`` directions of R^size, None if it has not just that many."""
        found = self._bases.get((layer, key))
        return found.to(device) if found is not None and (found.rank, found.size) == (rank, size) else None

    def scale(self, layer: str, key: BasisKey, rank: int, device: torch.device) -> Tensor | None:
        """None: it knows no weight."""
        return None


@dataclass(frozen=True)
class Sources:
    """The sources for one adapter.

    Attributes:
        own: the file of a self-contained adapter.
        data: directions that came from data.
        given: a prepared directory, or what else was given for the model.
    """

    own: FactorFiles | None = None
    data: DataDirections | None = None
    given: FactorSource | None = None

    def look_up(
        self, layer: str, sizes: Mapping[BasisKey, int], rank: int, bits: int, device: torch.device
    ) -> tuple[FactorSource | None, dict[BasisKey, StoredBasis]]:
        """The first source that has every basis of a form, and the bases by their keys.

        Args:
            layer: its module name.
            sizes: the length of a direction, for each key.
            rank: k.
            bits: 16, 8 or 4, how they have to be held.
            device: where they are put.

        Raises:
            ValueError: a basis that is held otherwise, or is damaged.
        """
        for source in (self.own, self.data, self.given):
            if source is None:
                continue
            found = {key: source.basis(layer, key, rank, size, device) for key, size in sizes.items()}
            bases = {key: basis for key, basis in found.items() if basis is not None}
            for key, basis in bases.items():
                if basis.stored.bits != bits:
                    raise ValueError(
                        f"{layer}: the stored basis {key} is held in {basis.stored.bits} bits, expected {bits}. "
                        "The file is damaged: copy it again, or make it again."
                    )
                basis.came_from = source
            if len(bases) == len(sizes):
                return source, bases
        return None, {}

    def own_bases(
        self, layer: str, sizes: Mapping[BasisKey, int], rank: int, bits: int, device: torch.device
    ) -> dict[str, StoredBasis] | None:
        """The bases that the adapter brings along, by their sides; for the rest see :meth:`look_up`."""
        source, bases = Sources(self.own).look_up(layer, sizes, rank, bits, device)
        return {key.side: basis for key, basis in bases.items()} if source is not None else None

    def check_weight(self, layer: str, key: BasisKey, weight: Tensor) -> None:
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


def sources_of(config: QSVFTConfig, model: nn.Module) -> Sources:
    """The sources for an adapter on a model: the file that its config was read beside, and what the model has.

    Raises:
        ValueError: the file is damaged.
    """
    data = vars(model).get("qsvft_directions")
    return Sources(_own_factors(config), data, getattr(model, "qsvft_factors", None))


def _own_factors(config: QSVFTConfig) -> FactorFiles | None:
    """The factors in the adapter's file, None if it is no self-contained one."""
    if not config.include_factors or config.where_read is None:
        return None
    path = weights_file(*config.where_read)
    if path is None:
        return None
    config.where_read = (os.path.dirname(path), None, {})  # without what only the download needed, such as a token
    return FactorFiles.from_file(path) or None


def weights_file(name: str, subfolder: str | None, options: Mapping[str, Any]) -> str | None:
    """The local path of an adapter's safetensors file, downloaded if need be; None if it has none.

    Args:
        name: the adapter's directory, or its id on the hub.
        subfolder: where in it.
        options: keyword arguments, of which those of ``hf_hub_download`` count.
    """
    folder = os.path.join(name, subfolder or "")
    if os.path.isdir(folder):
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        return path if os.path.isfile(path) else None
    known = inspect.signature(hf_hub_download).parameters
    chosen = {key: value for key, value in options.items() if key in known}
    try:
        return str(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **chosen))
    except EntryNotFoundError:
        return None
