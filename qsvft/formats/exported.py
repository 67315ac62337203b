"""What an export wrote, and how far off it is: what is printed, and what the card beside it says."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..tuner.config import QSVFTConfig


@dataclass
class Exported:
    """What was written.

    Attributes:
        folder: where.
        format: "lora", "dense", "gguf" or "gguf-lora".
        onto: the base that it is for: "held" or "original".
        dtype: of what was written, by its name.
        layers: how many layers change.
        rank: of the LoRA; None for a whole model.
        error: |written - wanted|_F over |dW|_F, of all layers together. What is wanted is dW of a LoRA and W + dW of a
            dense model, in fp32; its dtype's rounding is in it.
        worst: the layer where that is largest, and how large it is there.
        of_weights: the same difference over |W + dW|_F; None of a LoRA.
        errors: of a LoRA, the error of the best fit of each rank, before rounding.
        moved: |(W' + dW') - (W + dW)|_F over |W|_F, where it goes onto a base W' that is not the one it was trained on
            and that is at hand.
    """

    folder: Path
    format: str = "lora"
    onto: str = "held"
    dtype: str = "bfloat16"
    layers: int = 0
    rank: int | None = None
    error: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    of_weights: float | None = None
    errors: dict[int, float] = field(default_factory=dict)
    moved: float | None = None

    def __str__(self) -> str:
        file = ", as one GGUF file" if self.format.startswith("gguf") else ""
        what = f"dense model in {self.dtype}, of which {self.layers} layers change"
        if self.rank is not None:
            what = f"LoRA of rank {self.rank} on {self.layers} layers"
        lines = [f"{what}{file}: {self.folder}"]
        if self.errors:
            lines += ["of the adapter's change a LoRA leaves out (Frobenius norm, all layers):"]
            lines += [f"  rank {rank:>3}  {error:.2%}" for rank, error in self.errors.items()]
        return "\n".join([*lines, *self.said()])

    def said(self) -> list[str]:
        """The errors, in sentences."""
        if self.rank is not None:
            lines = [f"what is written is {self.error:.2%} off, with the rounding of its dtype"]
        else:
            lines = [
                f"rounding to {self.dtype} is {self.error:.2%} of the adapter's change, and {self.of_weights or 0:.2%} "
                "of the weights"
            ]
        if self.worst[1]:
            lines += [f"most in {self.worst[0]}: {self.worst[1]:.2%}"]
        if self.moved is not None:
            lines += [f"on the base before it was rounded: {self.moved:.2%} of the weights away from what was trained"]
        return lines


class Errors:
    """The sums over layers that the errors are made of."""

    def __init__(self) -> None:
        self._off = self._change = self._weight = self._moved = self._before = 0.0
        self._moves = False
        self.worst = ("", 0.0)

    def add(self, layer: str, off: float, change: float, weight: float = 0.0) -> None:
        """A layer's |written - wanted|_F, |dW|_F and |W + dW|_F."""
        self._off += off**2
        self._change += change**2
        self._weight += weight**2
        if change and off / change > self.worst[1]:
            self.worst = layer, off / change

    def add_move(self, moved: float, weight: float) -> None:
        """How far a layer is from the one that was trained, and |W|_F."""
        self._moves = True
        self._moved += moved**2
        self._before += weight**2

    @property
    def error(self) -> float:
        """Of all layers, over the change."""
        return _ratio(self._off, self._change)

    @property
    def of_weights(self) -> float:
        """Of all layers, over the weights."""
        return _ratio(self._off, self._weight)

    @property
    def moved(self) -> float | None:
        """None where every layer stands on the base that it was trained on."""
        return _ratio(self._moved, self._before) if self._moves else None


def _ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0


def write_card(folder: Path, found: Exported, config: QSVFTConfig) -> None:
    """README.md of what was exported: what it is, for which base, and its errors.

    Args:
        folder: where.
        found: what is written.
        config: of the adapter.
    """
    base = config.base_model_name_or_path
    held = ", ".join(f"{name} {value}" for name, value in config.held_base().items())
    lora = found.rank is not None
    what = f"A LoRA of rank {found.rank}" if lora else "A model"
    onto = f"as the adapter had it: {held}" if found.onto == "held" else "before rounding"
    rows = [f"| {rank} | {error:.2%} |" for rank, error in found.errors.items()]
    text = [
        "---",
        f"library_name: {'peft' if lora else 'transformers'}",
        *([f"base_model: {base}"] if base and not os.path.exists(base) else []),  # a hub id, not a place here
        f"tags: [{'lora' if lora else 'svft'}, qsvft]",
        "---",
        "",
        f"{what} in {found.dtype}, exported from an SVFT adapter (arXiv 2405.19597) of {found.layers} layers.",
        f"It is {'for' if lora else 'of'} the base {onto}.",
        "",
        *(f"- {line}" for line in found.said()),
        *(["", "| rank | left out of the change |", "|---|---|", *rows] if rows else []),
        "",
    ]
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")
