r"""MATH: the answer of a written solution, and whether it is the reference's.

Two answers are the same where their texts are, both normalised as Hendrycks' MATH does it: in the version of MetaMath's
``is_equiv``, which the paper used and lm-evaluation-harness's hendrycks_math has too. Nothing is cleverer than that, so
that the numbers can stand beside the paper's.

Right, and rejected by them and by ours: "10,000" for "10000", "0.25" for "\frac{1}{4}", "-0.5" for "-\frac{1}{2}",
"\frac{1}{\pi}" for "\frac1\pi", "\sqrt 3" for "\sqrt{3}", "50%" for "50\%", "$5$" for "5", "(a)" for "\text{(a)}",
"x \in [1,2]" for "[1,2]", "2,1" for "1,2", "1+x" for "x+1", "5 cm" for "5\text{ cm}".
Wrong, and accepted by them and by ours: "3\text{ cm}" for "3\text{ m}", "50\%" for "50", "90^\circ" for "90", "y=5" for
"x=5".

Where ours differs:

- Where their code stumbles, as over "x/2", it compares the texts as they were written. Ours compares what it has
  normalised: "x / 2" is x/2.
- A solution without "The answer is:" is wrong to MetaMath, and one without a box to the harness. Ours takes what
  follows the words, else the box.
- Braces that LaTeX escapes ("\{") do not count as braces of a box.
"""

from __future__ import annotations

import re

MARK = "The answer is:"

_BOX = re.compile(r"\\boxed(?![A-Za-z])")
_FRAME = re.compile(r"\\fbox(?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WHOLE = "(?:-?[1-9][0-9]*|0)"
_REPLACED = (
    ("\n", ""),
    (r"\!", ""),
    (r"\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
)


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed`` of a text holds, else its last ``\fbox``; None without one, or where it never closes.

    Without braces (``\boxed 5``) that is what stands up to the next dollar sign or the end of the line.
    """
    found = [*_BOX.finditer(text)] or [*_FRAME.finditer(text)]
    if not found:
        return None
    inside = text[found[-1].end() :].lstrip(" ")
    if not inside.startswith("{"):
        return re.split(r"[$\n]", inside, maxsplit=1)[0].strip() or None
    depth = 0
    for brace in _BRACE.finditer(inside):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return inside[1 : brace.start()].strip()
    return None


def answer(text: str) -> str | None:
    """The answer of a written solution, None where it gives none.

    That is what follows the last "The answer is:", up to a point that ends a line or the text; else the last box.
    """
    _, mark, after = text.rpartition(MARK)
    if not mark:
        return boxed(text)
    return after.split(".\n")[0].strip().removesuffix(".").strip() or None


def reference_answer(reference: str) -> str:
    """The answer of a reference: what its last box holds, or all of a text without one.

    Raises:
        ValueError: It is empty, or its box never closes.
    """
    has_box = _BOX.search(reference) or _FRAME.search(reference)
    found = boxed(reference) if has_box else reference.strip()
    if not found:
        raise ValueError(
            f"MATH: found no answer in the reference {reference!r}; expected \\boxed{{...}}, or the answer alone"
        )
    return found


def same(a: str, b: str) -> bool:
    """Whether two answers have the same text once they are normalised."""
    return normalised(a) == normalised(b)


def right(text: str, reference: str) -> bool:
    """Whether a written solution gives the reference's answer.

    Raises:
        ValueError: The reference has no answer.
    """
    expected, found = reference_answer(reference), answer(text)
    return found is not None and same(found, expected)


def normalised(text: str) -> str:
    r"""An answer in the form in which Hendrycks' MATH compares it.

    Left out: spaces, line breaks, ``\!``, ``\left``, ``\right``, degrees, dollar and percent signs with a backslash, a
    unit (``\text{ cm}``), and what stands before the only "=" if it is at most two characters. ``\dfrac``, ``\tfrac``,
    ``\frac12`` and 1/2 become ``\frac{1}{2}``, ``\sqrt3`` becomes ``\sqrt{3}``, .5 becomes 0.5, and that alone
    ``\frac{1}{2}``.
    """
    for old, new in _REPLACED:
        text = text.replace(old, new)
    before_unit, *units = text.split(r"\text{ ")
    text = (before_unit if len(units) == 1 else text).replace(r"\%", "")
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _with_braced_fractions(text)
    if text == "0.5":
        return r"\frac{1}{2}"
    return re.sub(rf"\A({_WHOLE})/({_WHOLE})\Z", r"\\frac{\1}{\2}", text)


def _with_braced_fractions(text: str) -> str:
    r"""A text with ``\frac12`` and ``\frac1{72}`` as ``\frac{1}{2}`` and ``\frac{1}{72}``."""
    before, *parts = text.split(r"\frac")
    return r"\frac".join((before, *(re.sub(r"^([^{])([^{]?)", _braced, part) for part in parts)))


def _braced(found: re.Match[str]) -> str:
    top, bottom = found.groups()
    return f"{{{top}}}{{{bottom}}}" if bottom else f"{{{top}}}"
