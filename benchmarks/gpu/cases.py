"""What is measured and for how many seconds, the most telling first: a kill at any time leaves the best there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LIMIT = 480
"""Seconds of a whole command, the start of the process included."""

RESERVE = 6
"""Seconds of it in which nothing is measured any more: the tables are written."""

BUDGETS = {"tiny": 60, "steps": 195, "longest": 85, "clock": 50, "decomposition": 20, "tests": 55}
"""Seconds of each stage, in the order in which they run. What one leaves over goes to those that were cut short."""

PATIENCE = 10
"""How many times as long a rehearsal may take for everything: it shares its processor with others."""

BATCH_SIZE = 1
QLORA = "qlora"
SMALLEST = "qsvft:factor_bits=4,quantize_embeddings=8"
LONG = "qsvft:quantize_embeddings=8,offload=true,tile_mlp=true"
FULL_RANK = "qsvft:sides=one,pattern=banded,factor_bits=4"

COMPARED = (
    QLORA,
    "qsvft",
    "qlora:chunked_loss=true",
    SMALLEST,
    FULL_RANK,
    "floor:chunked_loss=true",
    "qlora-kbit",
    "svft",
    LONG,
    "qsvft:rank=256",
    "qsvft:basis=data,residual=true",
)
"""The floor, QLoRA, QLoRA kbit, plain SVFT and settings of qsvft, the default first."""

OTHERS = (
    "qsvft:factor_bits=16",
    "qsvft:factor_bits=4",
    "qsvft:sides=one,pattern=banded",
    "lora",
    f"{SMALLEST},offload=true",
)
"""Its other rows, if there is time."""

KEEPING = " without checkpointing"
"""Behind a method: all activations are kept."""

FACTORED = ("qsvft", "svft", "svft-authors")
"""Methods whose singular vectors are replaced by random numbers: see random_factors.py."""


@dataclass(frozen=True)
class Pass:
    """One model with some methods, each built once and stepped at every length."""

    model: str
    lengths: tuple[int, ...]
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Search:
    """The longest sequence of some methods on cards of so many bytes, the shortest search first."""

    model: str
    methods: tuple[str, ...]
    cards: tuple[int, ...]


@dataclass(frozen=True)
class Matrices:
    """What is decomposed, in the shapes of a Llama's layer."""

    width: int
    inner: int
    rank: int
    layers: int


@dataclass(frozen=True)
class Plan:
    """All that the stages measure.

    Attributes:
        warmup: steps before the timed ones.
        least, most: bounds on the number of timed steps.
        timed_s: seconds that the timed steps of a case should take at most.
        forms: options of the small models that the card is compared with the CPU on.
        line: two lengths whose peaks say where to look for the longest sequence.
        longest: the longest that is tried.
    """

    passes: tuple[Pass, ...]
    searches: tuple[Search, ...]
    matrices: Matrices
    forms: tuple[dict[str, Any], ...] = ({}, {"factor_bits": 4}, {"sides": "one", "pattern": "random"})
    warmup: int = 2
    least: int = 5
    most: int = 12
    timed_s: float = 2.5
    line: tuple[int, int] = (512, 2048)
    longest: int = 2**18


GIB = 2**30
FULL = Plan(
    passes=(
        Pass("llama-3-8b", (2048,), COMPARED),
        Pass("llama-2-7b", (2048,), COMPARED),
        Pass("llama-2-7b", (2048,), (f"qsvft{KEEPING}", f"{QLORA}:chunked_loss=true{KEEPING}")),
        Pass("llama-3-8b", (512, 8192), COMPARED),
        Pass("llama-2-7b", (512, 8192), COMPARED),
        Pass("llama-3-8b", (2048,), OTHERS),
    ),
    searches=(
        Search("llama-3-8b", ("qsvft", QLORA, SMALLEST), (8 * GIB, 12 * GIB)),
        Search("llama-3-8b", (LONG,), (8 * GIB, 12 * GIB, 16 * GIB, 24 * GIB)),
        Search("llama-3-8b", (SMALLEST, QLORA), (16 * GIB, 24 * GIB)),
        Search("llama-2-7b", (SMALLEST, QLORA), (8 * GIB, 12 * GIB)),
        Search("llama-2-7b", (SMALLEST, QLORA), (16 * GIB, 24 * GIB)),
    ),
    matrices=Matrices(4096, 14336, 256, 32),
)
REHEARSAL = Plan(
    passes=(
        Pass("tiny", (32,), (QLORA, SMALLEST, "svft")),
        Pass("tiny", (16,), (QLORA, "floor:chunked_loss=true", f"{QLORA}{KEEPING}")),
    ),
    searches=(Search("tiny", (SMALLEST,), (3 * 2**20, 2**18)),),
    matrices=Matrices(96, 160, 12, 2),
    forms=({"factor_bits": 4},),
    warmup=1,
    least=3,
    most=3,
    line=(128, 256),
    longest=512,
)


def checkpointed(method: str) -> tuple[str, bool]:
    """A method's own text, and whether its layers are checkpointed."""
    return method.removesuffix(KEEPING), not method.endswith(KEEPING)


def step_case(model: str, method: str, seq_len: int) -> str:
    """A step as its rows name it, without what is measured of it."""
    return f"{model} | {method} | {seq_len} tokens"


def search_case(model: str, method: str, card: int) -> str:
    """A search as its rows name it."""
    return f"{model} | {method} | a card of {card / GIB:g} GiB"


def steps_of(plan: Plan) -> Iterator[tuple[str, str, int]]:
    """(model, method, length) of every step, in the order in which they are measured."""
    for one in plan.passes:
        for method in one.methods:
            for seq_len in one.lengths:
                yield one.model, method, seq_len


def searches_of(plan: Plan) -> Iterator[tuple[str, str, int]]:
    """(model, method, bytes of the card) of every search, in their order."""
    for search in plan.searches:
        for method in search.methods:
            for card in search.cards:
                yield search.model, method, card
