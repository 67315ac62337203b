"""Options that earlier versions had. What was saved with one of them is refused, and never read as something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..maths.updates import TAIL_DAMPING

REMOVED: dict[str, tuple[Any, ...]] = {"share_inputs": (False, None, []), "tail_damping": (TAIL_DAMPING,)}
"""By their names the values with which they meant what this version does."""

REMOVED_BASES = ("hadamard",)


def without_removed(saved: Mapping[str, Any], where: str, instead: str) -> dict[str, Any]:
    """The saved fields of a config, less the options that this version does not have.

    Args:
        saved: the fields, by their names.
        where: they were found, for the message.
        instead: what to do, a sentence for the message.

    Raises:
        ValueError: an option that is gone, with a value that meant something else.
    """
    found = [name for name, harmless in REMOVED.items() if name in saved and saved[name] not in harmless]
    found += ["basis"] if saved.get("basis") in REMOVED_BASES else []
    if found:
        expected = " or ".join(f"{name}={REMOVED[name][0]!r}" if name in REMOVED else "another basis" for name in found)
        raise ValueError(
            f"{where}: found {', '.join(f'{name}={saved[name]!r}' for name in found)}, which earlier versions of qsvft "
            f"had and this one does not; expected {expected}. {instead}"
        )
    return {name: value for name, value in saved.items() if name not in REMOVED}
