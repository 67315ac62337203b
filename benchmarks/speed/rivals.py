"""Who is timed, by the texts of ``qsvft.memory.methods``, and how each is built: one set-up for bytes and time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from qsvft.lean.norms import lean_norms
from qsvft.memory.methods import parse_method
from qsvft.memory.scenario import Scenario

sys.path.append(str(Path(__file__).resolve().parents[1]))
from random_factors import random_factors

OPTIMIZER = "adamw"


@dataclass(frozen=True)
class Rival:
    """A method as it is timed.

    Attributes:
        name: as the tables call it.
        text: as ``qsvft.memory.methods`` reads it.
        lean: with the norms that keep their input alone, which qsvft has anyway.
    """

    name: str
    text: str
    lean: bool = False


UNIT = Rival("QLoRA r=16", "qlora:chunked_loss=true", lean=True)
"""What ratios are to: PEFT's QLoRA with the norms, the loss in chunks and the checkpointing that qsvft has."""

BANDED = "qsvft:sides=one,pattern=banded"
PLAIN = "qsvft:pattern=plain,sides=both,rank=full,bits=16,factor_bits=16"
RIVALS = (
    UNIT,
    Rival("QLoRA as tutorials", "qlora-kbit"),
    Rival("qsvft", "qsvft"),
    Rival("qsvft k=256", "qsvft:rank=256"),
    Rival("qsvft calibrated", "qsvft:basis=data,residual=true"),
    Rival("one-sided banded", BANDED),
    Rival("one-sided banded, NF4 factors", f"{BANDED},factor_bits=4"),
    Rival("two-sided banded", "qsvft:sides=both,pattern=banded,rank=full"),
    Rival("plain SVFT", "svft"),
    Rival("authors' SVFT", "svft-authors"),
    Rival("authors' M in qsvft", PLAIN),
)
"""All of them. The last two train the same: a diagonal M, both sides, full rank, everything in bf16."""

SHORT = tuple(one for one in RIVALS if one.text in (UNIT.text, "qsvft", BANDED, "svft", "svft-authors", PLAIN))
"""Those of the short form."""


def chosen(texts: Sequence[str] | None, short: bool) -> tuple[Rival, ...]:
    """The rivals that are asked for by their texts, the unit first.

    Raises:
        ValueError: one line, of a text that is no method's.
    """
    if not texts:
        return SHORT if short else RIVALS
    known = {one.text: one for one in RIVALS}
    for text in texts:
        parse_method(text)
    found = [known.get(text, Rival(text, text)) for text in texts]
    return tuple(dict.fromkeys((UNIT, *found)))


def scenario(
    rival: Rival, config: PretrainedConfig, device: str = "cpu", base: PreTrainedModel | None = None
) -> Scenario:
    """A rival on a model: random weights, or those of ``base``, which becomes the rival's own; random directions.

    On the device "meta" nothing has values, and nothing is drawn.
    """
    with nullcontext() if device == "meta" else random_factors():
        found = Scenario(config, parse_method(rival.text), True, OPTIMIZER, device, base)
    if rival.lean:
        lean_norms(found.base)
    return found
