"""The base of an adapter, of which one layer or tensor is read at a time: as it was trained on, and before rounding."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.prepared.check import Prepared, check_config, open_prepared
from ..checkpoint.prepared.layers import names_in_files, read_layer, split_as_held
from ..checkpoint.prepared.record import read_record, recorded_options
from ..checkpoint.source.architecture import model_class, on_meta, read_config
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.pieces import Piece, read_piece
from ..storage.experts import expert_layers
from ..storage.factor_files import FactorFiles
from ..tuner.config import QSVFTConfig
from ..tuner.heads import Head


class Base:
    """A prepared directory.

    Args:
        folder: the directory.
        head: what an adapter brings of the model's.
        original: the checkpoint that it was prepared from, where that is at hand.

    Attributes:
        folder: the directory.
        config: of the model, without a word of its preparation.
        whole: the model on the meta device, as its class makes it.
        model: the same with linear layers for experts, where the directory has them.
        dtype: of the weights before they were quantised.
        bits: how many they are held in.
        experts: the names of experts' linear layers, with that of the parameter that each is a part of.
        factors: beside the weights.
        original: as given.
    """

    def __init__(self, folder: Path, head: Head, original: Original | None) -> None:
        check_config(folder)
        self._prepared: Prepared = open_prepared(folder)
        self._prepared.check()
        record = read_record(folder) or {}
        self._adapter = QSVFTConfig(**recorded_options(record))
        self.folder, self.original = folder, original
        self.dtype: torch.dtype = getattr(torch, str(record.get("compute_dtype")))
        self.bits = record.get("bits")
        self.config = read_config(folder)
        del self.config.quantization_config
        for name, value in head.options.items():
            setattr(self.config, name, value)
        self._kind = head.kind if head.kind is not None else model_class(self.config)
        self.whole = self.empty(self.dtype)
        self.model = deepcopy(self.whole)
        split_as_held(self._prepared, self.model)
        self.experts = expert_layers(self.model)
        self.factors = FactorFiles(self._prepared.files.paths)

    def empty(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on the meta device, in some dtype."""
        return on_meta(self.config, self._kind, dtype)

    def layer(self, name: str) -> nn.Module:
        """A linear layer as it is held.

        Raises:
            ValueError: the model or the directory has no such layer.
        """
        try:
            plain = self.model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"{name}: the adapter has an M for this layer, but {type(self.model).__name__} has no such layer. Give "
                "the base that the adapter was trained on."
            ) from error
        known = self._known(f"{name}.weight")
        found = name if known is None else known.removesuffix(".weight")
        return read_layer(self._prepared, found, plain, self.dtype, self._adapter, self.factors)

    def is_quantised(self, name: str) -> bool:
        """Whether a linear layer is held in 4 or 8 bits."""
        known = self._known(f"{name}.weight")
        return known is not None and self._prepared.quantised_shape(known.removesuffix(".weight")) is not None

    def has(self, tensor: str) -> bool:
        """Whether the directory has a tensor, by its name in the model."""
        return self._known(tensor) is not None

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored, mapped from the file."""
        known = self._known(name)
        assert known is not None, name
        return self._prepared.files.mapped(known)

    def original_weight(self, layer: str) -> Tensor:
        """The weight (m, n) that a linear layer had before anything was quantised."""
        assert self.original is not None
        if layer in self.experts:
            return self.original_part(layer, "weight")
        weight = self.original.tensor(f"{layer}.weight")
        return weight.t() if isinstance(self.model.get_submodule(layer), Conv1D) else weight

    def original_part(self, expert: str, leaf: str) -> Tensor:
        """The weight (m, n) or bias of one expert's layer, as it was."""
        assert self.original is not None
        parameter, number = self.experts[expert], int(expert.rpartition(".")[2])
        if leaf == "bias":
            return self.original.tensor(f"{parameter}_bias")[number]
        module: Any = self.whole.get_submodule(parameter.rpartition(".")[0])
        weight = self.original.tensor(parameter)[number]
        return weight.t() if module.is_transposed else weight

    def _known(self, name: str) -> str | None:
        return next((one for one in names_in_files(self.model, name) if one in self._prepared.entries), None)


class Original:
    """A checkpoint's tensors by their names in the model, before anything is quantised.

    Args:
        checkpoint: the source.
        model: of it, on the meta device, as its class makes it.
        pieces: how its tensors are read.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, pieces: Iterable[Piece]) -> None:
        self._checkpoint, self._model = checkpoint, model
        self._pieces = {target: piece for piece in pieces for target in piece.targets}
        self._last: tuple[Piece | None, dict[str, Tensor]] = None, {}

    def known(self, name: str) -> str | None:
        """The name by which the checkpoint's own class has a tensor; None if it has it not."""
        return next((one for one in names_in_files(self._model, name) if one in self._pieces), None)

    def tensor(self, name: str) -> Tensor:
        """A tensor, in the dtype of the base."""
        known = self.known(name)
        if known is None:
            raise ValueError(f"{self._checkpoint.name}: found no {name} in it; expected each layer of the adapter.")
        piece = self._pieces[known]
        if self._last[0] != piece:
            self._last = None, {}
            self._last = piece, read_piece(self._checkpoint, piece, self._model)
        return self._last[1][known]
