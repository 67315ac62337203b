"""``print(qsvft.describe(model))``: every tensor that a model holds, in a table."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from .cards import unit_of
from .held import GRADIENTS, KINDS, SCALES, STATE, Held, M, held
from .table import WIDTH

FLAGGED_BYTES = 2**20
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class HeldRow:
    """The tensors of one kind and dtype.

    Attributes:
        kind: what they are, one of :data:`qsvft.memory.held.KINDS`.
        dtype: such as "bfloat16".
        tensors: how many storages; tensors that share one count once.
        nbytes: bytes of the storages.
        wide: names of those that are in fp32 without need: larger than 1 MiB, and neither M, its gradient,
            a scale nor quantisation state. Often a copy that somebody made.
    """

    kind: str
    dtype: str
    tensors: int
    nbytes: int
    wide: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found. ``print`` shows it as a table."""

    rows: tuple[HeldRow, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of everything the model holds."""
        return sum(row.nbytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``."""
        return {"total_bytes": self.total_bytes, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        console.print(_table(self), highlight=False)
        names = [name for row in self.rows for name in row.wide]
        if names:
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            shown = ", ".join(names[:_NAMES_SHOWN])
            console.print(f"fp32 and larger than 1 MiB, where nothing needs it: {shown}{more}", markup=False)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def describe(model: nn.Module) -> Description:
    """List every tensor that a model holds, by what it is and its dtype.

    Args:
        model: any model, prepared or not, on any device; what is on the CPU of a model on CUDA counts too.

    Returns:
        A :class:`Description`, with ``rows``, ``total_bytes`` and ``to_dict()``.
    """
    groups: dict[tuple[str, torch.dtype], list[Held]] = {}
    for item in held(model):
        groups.setdefault((item.kind, item.tensor.dtype), []).append(item)
    rows = [
        HeldRow(
            kind,
            str(dtype).removeprefix("torch."),
            len(items),
            sum(item.nbytes for item in items),
            tuple(item.name for item in items if _is_wide(item)),
        )
        for (kind, dtype), items in groups.items()
    ]
    return Description(tuple(sorted(rows, key=lambda row: (KINDS.index(row.kind), -row.nbytes))))


def _is_wide(item: Held) -> bool:
    if item.tensor.dtype not in (torch.float32, torch.float64) or item.nbytes <= FLAGGED_BYTES:
        return False
    of_M = item.kind == GRADIENTS and "qsvft_M" in item.name.split(".")
    return not of_M and item.kind not in (M, SCALES, STATE)


def _table(description: Description) -> Table:
    unit, size = unit_of([description.total_bytes])
    table = Table(title="What the model holds", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for heading in ("tensors", "bytes", unit, "fp32 over\n1 MiB"):
        table.add_column(heading, justify="right")
    for row in description.rows:
        wide = str(len(row.wide)) if row.wide else ""
        table.add_row(row.kind, row.dtype, f"{row.tensors:,}", f"{row.nbytes:,}", f"{row.nbytes / size:.3f}", wide)
    tensors = sum(row.tensors for row in description.rows)
    table.add_section()
    total = description.total_bytes
    table.add_row("total", "", f"{tensors:,}", f"{total:,}", f"{total / size:.3f}", "")
    return table
