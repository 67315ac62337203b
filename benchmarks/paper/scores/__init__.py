"""Whether what a model wrote is right, by the names of the paper's sets; GLUE's figures are in ``glue.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from . import choices, latex, numbers


@dataclass(frozen=True)
class Score:
    """How the answers of a set are read.

    Attributes:
        answer: the answer in a text that a model wrote, None where there is none.
        right: whether a text gives the answer of a reference; ValueError if the reference is none of this set.
    """

    answer: Callable[[str], str | None]
    right: Callable[[str, str], bool]


def _choosing(names: Sequence[str]) -> Score:
    return Score(partial(choices.answer, names=names), partial(choices.right, names=names))


SCORES = {
    "gsm8k": Score(numbers.answer, numbers.right),
    "math": Score(latex.answer, latex.right),
    **{name: _choosing(names) for name, names in choices.CHOICES.items()},
}
