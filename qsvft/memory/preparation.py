"""The bytes while ``prepare()`` runs, on a real model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..prepare import prepare
from .held import held_tensors
from .ledger import Ledger


@dataclass(frozen=True)
class PreparationPeak:
    """Bytes before, at the highest point of, and after a preparation.

    Attributes:
        working_set: what preparing needed beyond the larger of the model before and the model after.
    """

    before: int
    peak: int
    after: int

    @property
    def working_set(self) -> int:
        return self.peak - max(self.before, self.after)


def count_preparation(model: nn.Module, **options: Any) -> PreparationPeak:
    """Prepare a model in place under the ledger.

    Args:
        model: a real model (not on the meta device).
        **options: as for :func:`qsvft.prepare`.
    """
    ledger = Ledger()
    for tensor, category in held_tensors(model):
        ledger.register(tensor, category)
    before = ledger.live_bytes()
    with ledger:
        prepared = prepare(model, progress=False, **options)
    after = ledger.live_bytes()
    del prepared
    return PreparationPeak(before, ledger.high_water(), after)
