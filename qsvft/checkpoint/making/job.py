"""A checkpoint with what is to be made of it: everything that a process needs to do units of the plan."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...options.choices import BASE_BITS
from ...storage.experts import expert_parameters
from ...tuner.config import QSVFTConfig
from ...tuner.experts import split_for
from ...tuner.heads import Head
from ...tuner.tasks import check_residual, config_for, left_whole
from ..source.architecture import FLOATS
from ..source.checkpoint import Checkpoint, first_few, open_checkpoint
from ..source.experts import pieces_of_experts
from ..source.names import Names, empty_model, pieces_of
from .directory import Directory, Record
from .plan import Options, Unit, plan_digest, plan_units
from .work import finish_unit, weight_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What to prepare. Pickled as its fields; model and plan are made where they are needed.

    Attributes:
        checkpoint: the source.
        bits: 4, 8 or 16.
        config: for which adapters, None for the default of ``given``.
        given: single options of a :class:`~qsvft.QSVFTConfig`.
        dtype: of the weights before they are quantised; None as the checkpoint has them.
        head: the class of an adapter that brings a head, and what the checkpoint may lack for it.
    """

    checkpoint: Checkpoint
    bits: int = 4
    config: QSVFTConfig | None = None
    given: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    head: Head = field(default_factory=Head)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @cached_property
    def source_model(self) -> PreTrainedModel:
        """The model on the meta device as its class makes it: what is read."""
        return empty_model(self.checkpoint, self.dtype, self.head.kind, self.head.options)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device with linear layers for experts: what is written."""
        _ = self.source_names  # which weights are tied may follow from the checkpoint
        if not any(expert_parameters(module) for module in self.source_model.modules()):
            return self.source_model
        model = deepcopy(self.source_model)
        split_for(model, self.options.config, self.options.bits != 16)
        return model

    @cached_property
    def options(self) -> Options:
        """All that decides the result.

        Raises:
            ValueError: bits or an option out of range.
        """
        if self.bits not in BASE_BITS:
            raise ValueError(f"bits must be 4 (NF4), 8 (int8) or 16 (the weights as they are), got {self.bits!r}")
        if self.config is not None and self.given:
            raise ValueError(f"give either config or single options, got both: {sorted(self.given)}")
        config = self.config if self.config is not None else config_for(self.source_model, self.given)
        check_residual(config, self.bits)
        # Which entries of M train, and what the directions give back to a base that stays as it is, is each adapter's.
        config = replace(config, pattern="plain", residual=config.residual_base)
        dtype = str(self.source_model.dtype).removeprefix("torch.")
        return Options(self.bits, config, dtype, tuple(left_whole(config)))

    @cached_property
    def source_names(self) -> Names:
        """How the checkpoint's keys give the tensors of the model as its class makes it."""
        return pieces_of(self.checkpoint, self.source_model, self.head.brought)

    @cached_property
    def names(self) -> Names:
        """How the checkpoint's keys give the model's tensors."""
        found = self.source_names
        pieces = pieces_of_experts(self.checkpoint, self.source_model, self.model, found.pieces)
        return replace(found, pieces=tuple(pieces))

    @cached_property
    def units(self) -> list[Unit]:
        """The plan."""
        return plan_units(self.model, self.names.pieces, self.options)

    @cached_property
    def digest(self) -> str:
        """Of the plan."""
        return plan_digest(self.units, self.options)

    def without_directions(self) -> Job:
        """Where the directions come from data nothing is decomposed: one directory serves all such adapters."""
        config = self.options.config
        if config.basis != "data":
            return self
        named = ("modules_to_save", "task_type")
        said = {name: value for name in named if (value := getattr(config, name)) is not None}
        return replace(self, config=None, given={"basis": "data", **said})

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The linear layers' names with their weights (m, n) as they are in the checkpoint, one unit at a time."""
        for unit in self.units:
            if unit.layer is not None:
                yield unit.layer.name, weight_of(unit, self.checkpoint, self.source_model)

    def target(self, folder: Any) -> Directory:
        """The directory for it."""
        return Directory(folder, [unit.name for unit in self.units], self.digest)

    def do(self, number: int, target: Directory, device: torch.device) -> Record:
        """Do one unit and write it.

        Raises:
            ValueError: NaN or Inf in a weight; the source changed meanwhile.
            OSError: reading or writing failed.
        """
        tensors, source = finish_unit(self.units[number], self.checkpoint, self.source_model, self.options, device)
        self.checkpoint.check_unchanged()
        record = target.write(number, tensors, source)
        del tensors
        give_memory_back()
        return record


def open_job(
    source: str | os.PathLike[str],
    bits: int,
    config: QSVFTConfig | None,
    options: Mapping[str, Any],
    *,
    dtype: torch.dtype | str | None = None,
    head: Head | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Job:
    """Open a checkpoint, and check everything that can be checked before work begins; see :func:`prepare_checkpoint`.

    Raises:
        ValueError: what cannot be prepared, or not with these options.
    """
    checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir, token=token)
    job = Job(checkpoint, bits, config, dict(options), chosen_dtype(dtype), head or Head())
    if not job.units:
        raise ValueError(f"{checkpoint.name}: found no tensors of {type(job.model).__name__}, expected its weights")
    if job.names.unknown:
        logger.warning(
            "%s: left out %d tensors that %s does not have: %s",
            *(checkpoint.name, len(job.names.unknown), type(job.model).__name__, first_few(job.names.unknown)),
        )
    return job


def chosen_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype of its name; None for "auto"."""
    if dtype in (None, "auto"):
        return None
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in FLOATS:
        raise ValueError(f"dtype: expected 'auto', 'bfloat16', 'float16' or 'float32', got {dtype!r}")
    assert isinstance(chosen, torch.dtype)
    return chosen


def give_memory_back() -> None:
    """To the system: glibc keeps freed heap for itself; the next matrix may need larger pieces than those."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
