r"""GSM8K: the number that a written solution ends with, and whether it is the reference's.

Where it is looked for: behind the last mark, which is "The answer is", as models trained on MetaMathQA end, or "####"
with a number behind it, as GSM8K's own solutions do. It is the first number there, and none if there is no number. In a
text without a mark it is the last number.

How it is read:

- A comma between digits separates thousands, wherever it stands ("1,234", "1,00,000"), and so does LaTeX's "{,}".
- A sign counts beside its number or its currency ("-5", "-$5", "$-5", also as U+2212), and not behind another number:
  the 15 of "10-15" is no -15.
- Fractions are exact: "3/4", "2 1/2", "\frac{3}{4}". So is the comparison: "3.0" is 3, "0.50" is 1/2, and 3.6 is not 4.
- What follows a number is not read: a unit, "%", "million".
- A time ("5:30"), digits with several points ("1.234.567"), a division by 0 and more than 300 characters are no number;
  an answer that is one of these is none, and wrong.

Where the peers differ, MetaMath's ``eval_gsm8k.py``, which the paper used, and lm-evaluation-harness's task gsm8k:

- MetaMath rounds what is written: 3.6 and 7/2 are right where 4 is asked for.
- MetaMath reads one separator: "1,234,567" is 1,234 to it and "1,234.5" too; "5:30" is 5, "2 1/2" is 2, "-$5" is 5.
- MetaMath wants "The answer is: " to the letter, and nothing else is right. The harness's strict match takes what
  follows the first "#### ", its flexible one the last number. Ours takes what is marked.
- The harness compares texts: "3.0" is not 3 to it, and "10-15" is -15.
- Like MetaMath, ours reads "5 + 3 = 8" behind a mark as 5, "2 million" as 2, "1e5" as 1 and "1 234" as 1.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 300
"""Characters of a number; the largest double has about as many digits."""

_DIGITS = r"(?:[0-9]+(?:[.,:][0-9]+)*|(?<!\w)\.[0-9]+)"
_CURRENCY = r"\\?[$€£]"
_NUMBER = re.compile(
    rf"(?P<minus>(?<![\w)}}\]%])-(?:{_CURRENCY})?|{_CURRENCY}-)?"
    rf"(?:(?:(?P<whole>[0-9]+)\ )?(?P<top>{_DIGITS})/(?P<bottom>{_DIGITS})|(?P<number>{_DIGITS}))"
)
_MARK = re.compile(rf"The answer is|####(?=\s*(?:{_CURRENCY})?{_NUMBER.pattern})")
_WELL_FORMED = re.compile(r"[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+")


def final_number(text: str) -> Fraction | None:
    """The number that a written solution gives as its answer, None where it gives none."""
    text = _plain(text)
    marks = list(_MARK.finditer(text))
    if marks:
        found = _NUMBER.search(text, marks[-1].end())
    else:
        *_, found = (None, *_NUMBER.finditer(text))
    return _value(found) if found else None


def reference_number(reference: str) -> Fraction:
    """The number of a reference: what stands after the last "####" of a solution, or all of a text without one.

    Raises:
        ValueError: That is not a number and nothing else.
    """
    written = reference.rpartition("####")[2].strip()
    found = _NUMBER.fullmatch(_plain(written))
    value = _value(found) if found else None
    if value is None:
        raise ValueError(f"GSM8K: the reference ends with {written!r}; expected a number, alone or after '####'")
    return value


def answer(text: str) -> str | None:
    """The answer of a written solution as a whole number or a fraction in lowest terms, None where it gives none."""
    found = final_number(text)
    return None if found is None else str(found)


def right(text: str, reference: str) -> bool:
    """Whether a written solution gives the reference's number.

    Raises:
        ValueError: The reference has no number.
    """
    return final_number(text) == reference_number(reference)


def _plain(text: str) -> str:
    """A text with one minus, one separator of thousands, and fractions on one line."""
    text = re.sub(r"\{,\}|,\\!", ",", text.replace("−", "-"))
    text = re.sub(r"(?<=[0-9]) ?(?=\\[dt]?frac\b)", " ", text)
    return re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)


def _value(found: re.Match[str]) -> Fraction | None:
    if found["number"]:
        size = _parsed(found["number"])
    else:
        whole, top, bottom = (_parsed(found[name] or "0") for name in ("whole", "top", "bottom"))
        size = None if whole is None or top is None or not bottom else whole + top / bottom
    return -size if size is not None and found["minus"] else size


def _parsed(digits: str) -> Fraction | None:
    if len(digits) > LONGEST or not _WELL_FORMED.fullmatch(digits):
        return None
    return Fraction(digits.replace(",", ""))
