"""What is measured: models, sequence lengths and methods, the most telling first.

A cut-off then leaves the comparison that matters, and a rerun adds the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsvft.memory import METHODS

BATCH_SIZE = 1
LEAN = (
    "qsvft:factor_bits=4",
    "qsvft:factor_bits=4,rank=256",
    "qsvft:factor_bits=4,share_inputs=false",
    "qlora:chunked_loss=true",
    "floor:chunked_loss=true",
    "qsvft:factor_bits=4,quantize_embeddings=8",
    "qsvft:factor_bits=4,offload_checkpoints=true",
    "qsvft:basis=hadamard",
    "qsvft:factor_bits=8",
)
FIRST = ("qlora", "qsvft", *LEAN[:4], "floor", "lora", "qlora-kbit", "svft", *LEAN[4:])
# Their singular vectors are replaced by random numbers: see steps.random_factors.
FACTORED = ("qsvft", "svft", "svft-authors")


@dataclass(frozen=True)
class Plan:
    """The cases of the memory and the speed stage.

    Attributes:
        warmup: steps before the timed ones.
        least, most: bounds on the number of timed steps.
        timed_s: seconds that the timed steps of a case should take at most.
    """

    models: tuple[str, ...]
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    warmup: int = 3
    least: int = 5
    most: int = 20
    timed_s: float = 6.0


FULL = Plan(
    models=("llama-2-7b", "llama-3-8b"),
    lengths=(2048, 512),
    methods=(*FIRST, *(name for name in METHODS if name not in FIRST)),
)
REHEARSAL = Plan(
    models=("tiny",),
    lengths=(32,),
    methods=("qlora", "qsvft", LEAN[0], LEAN[-2], "floor", "svft"),
    warmup=1,
    least=3,
    most=3,
)


def name(model: str, method: str, seq_len: int) -> str:
    """A case as its row names it."""
    return f"{model} | {method} | {seq_len} tokens"
