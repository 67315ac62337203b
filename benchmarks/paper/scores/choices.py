"""Questions with choices: the choice that a written answer names, and the choice that is likeliest.

As in LLM-Adapters' ``commonsense_evaluate.py``, which the paper used, the first name of a choice in the text is the
answer ("the correct answer is answer2"), and a text without one is wrong. Ours differs in two things: the case does not
matter ("True"), and a name is a whole word, so that "untrue" is not true and "answer12" not answer1. Like theirs, it
reads no more than the name: "answer 2", "2" and "B" are none, "not true" is true, and a text that repeats
"answer1/answer2" from the question is answer1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

TRUTH = ("true", "false")
ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
SOLUTIONS = ("solution1", "solution2")
ENDINGS = ("ending1", "ending2", "ending3", "ending4")
OPTIONS = ("option1", "option2")

CHOICES = {
    "boolq": TRUTH,
    "piqa": SOLUTIONS,
    "siqa": ANSWERS,
    "hellaswag": ENDINGS,
    "winogrande": OPTIONS,
    "arc": ANSWERS,
    "openbookqa": ANSWERS,
}
"""The names of the choices of each set, as its prompts ask for them."""


def answer(text: str, names: Sequence[str]) -> str | None:
    """The first of the names in a text, None where none of them stands there as a word."""
    found = re.search(rf"\b(?:{'|'.join(map(re.escape, names))})\b", text, re.IGNORECASE)
    return found[0].lower() if found else None


def right(text: str, reference: str, names: Sequence[str]) -> bool:
    """Whether a text names the reference first.

    Raises:
        ValueError: The reference is none of the names.
    """
    if reference not in names:
        raise ValueError(f"the reference is {reference!r}; expected one of {', '.join(names)}")
    return answer(text, names) == reference


def likeliest(log_probabilities: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The index of the likeliest choice: that of the greatest sum of log probabilities, the first of several.

    Args:
        log_probabilities: the sum over each choice's tokens; minus infinity is one, NaN is none.
        lengths: what each sum is divided by. With the choices' numbers of characters this is acc_norm of
            lm-evaluation-harness, without lengths its acc.

    Raises:
        ValueError: No choices, another number of lengths, a length below 1, or NaN.
    """
    if not log_probabilities:
        raise ValueError("found no log probabilities; expected one of each choice")
    divisors = [1] * len(log_probabilities) if lengths is None else lengths
    if len(divisors) != len(log_probabilities):
        raise ValueError(f"found {len(divisors)} lengths of {len(log_probabilities)} choices; expected one of each")
    if min(divisors) < 1:
        raise ValueError(f"found a choice of length {min(divisors)}; expected lengths of at least 1")
    if any(map(math.isnan, log_probabilities)):
        raise ValueError(
            f"found NaN among the log probabilities {list(log_probabilities)}; expected numbers or minus infinity"
        )
    scores = [value / length for value, length in zip(log_probabilities, divisors, strict=True)]
    return scores.index(max(scores))
