r"""Solutions worked by hand: what a model wrote, the reference, and whether it is right by the rules of this folder.

The tests hold the scores to them, and ``against_peers.py`` shows what others say of them.
"""

from __future__ import annotations

Case = tuple[str, str, bool]

_NUMBERS: tuple[Case, ...] = (
    # The mark.
    ("The answer is: 42", "#### 42", True),
    ("#### 42", "#### 42", True),
    ("She has 40 + 2 = <<40+2=42>>42 left.\n#### 42\nThe answer is: 42", "6 * 7 = 42\n#### 42", True),
    ("The answer is: 41. No: The answer is: 42", "#### 42", True),
    ("The answer is: 42. No: The answer is: 41", "#### 42", False),
    ("The answer is 42.", "#### 42", True),
    ("The answer is: 42 apples in 3 boxes", "#### 42", True),
    ("The answer is: 42 apples in 3 boxes", "#### 3", False),
    ("It is 42. The answer is: unknown", "#### 42", False),
    ("It is 42. The answer is:", "#### 42", False),
    ("The answer is 5 more.\n#### 42", "#### 42", True),
    ("#### Step 2\n6 * 7 = 42", "#### 42", True),
    ("####42", "#### 42", True),
    ("#### $42", "#### 42", True),
    ("#### 41\n#### 42", "#### 42", True),
    ("3 boxes of 14 are 42", "#### 42", True),
    ("So it is 42 in 3 boxes", "#### 42", False),
    ("3 * 14 = <<3*14=42>>42.", "#### 42", True),
    ("I do not know.", "#### 42", False),
    ("", "#### 0", False),
    # Thousands.
    ("The answer is: 1,234", "#### 1234", True),
    ("The answer is: 1234", "#### 1,234", True),
    ("The answer is: 1,234,567", "#### 1,234,567", True),
    ("The answer is: 1,234,567", "#### 1234", False),
    ("The answer is: 1,00,000 rupees", "#### 100000", True),
    ("The answer is: 10{,}000", "#### 10000", True),
    ("The answer is: 42, 43", "#### 42", True),
    ("The answer is: 1,234.5", "#### 1234.5", True),
    ("The answer is: 1,234.5", "#### 1234", False),
    ("The answer is: 1.234.567", "#### 1", False),
    ("The answer is: 1.234.567", "#### 1234567", False),
    # Signs and money.
    ("The answer is: -5", "#### -5", True),
    ("The answer is: −5", "#### -5", True),
    ("The answer is: -$5", "#### -5", True),
    ("The answer is: $-5", "#### -5", True),
    ("The answer is: \\$-5", "#### -5", True),
    ("The answer is: $5", "#### 5", True),
    ("The answer is: €5", "#### 5", True),
    ("The answer is: -5", "#### 5", False),
    ("The answer is: 5", "#### -5", False),
    ("The answer is: +5", "#### 5", True),
    ("It takes 10-15", "#### 15", True),
    ("It takes 10-15", "#### -15", False),
    ("He owes, so it is -15", "#### -15", True),
    # Decimals, fractions, units.
    ("The answer is: 3.0", "#### 3", True),
    ("The answer is: $18.00.", "#### 18", True),
    ("The answer is: 0.50", "#### 1/2", True),
    ("The answer is: .5", "#### 0.5", True),
    ("The answer is: 3.6", "#### 4", False),
    ("The answer is: 3/4", "#### 0.75", True),
    ("The answer is: 7/2", "#### 4", False),
    ("The answer is: 2 1/2", "#### 2.5", True),
    ("The answer is: 2 1/2", "#### 2", False),
    ("The answer is: -2 1/2", "#### -2.5", True),
    ("The answer is: $\\frac{3}{4}$", "#### 0.75", True),
    ("The answer is: $2\\frac{1}{2}$", "#### 2.5", True),
    ("The answer is: $-\\dfrac{1}{2}$", "#### -0.5", True),
    ("The answer is: 5/0", "#### 5", False),
    ("The answer is: 42%", "#### 42", True),
    ("The answer is: 42\\%", "#### 42", True),
    ("The answer is: **42**", "#### 42", True),
    ("The answer is: $\\boxed{42}$", "#### 42", True),
    ("The answer is: the 3rd", "#### 3", True),
    ("The answer is: 42.\nThat was easy", "#### 42", True),
    ("The answer is: 5:30", "#### 5", False),
    ("The answer is: 5:30", "#### 30", False),
    ("The answer is: infinity", "#### 42", False),
    ("The answer is: inf", "#### 42", False),
    ("The answer is: " + "9" * 301, "#### " + "9" * 300, False),
    ("The answer is: " + "9" * 300, "#### " + "9" * 300, True),
    ("The answer is: " + "9" * 5000, "#### 9", False),
    # Wrong readings that the field shares.
    ("The answer is: 5 + 3 = 8", "#### 8", False),
    ("The answer is: 2 million", "#### 2", True),
    ("The answer is: 1 234", "#### 1234", False),
)

_LATEX: tuple[Case, ...] = (
    # Where the answer stands.
    ("The answer is: 5", "5", True),
    ("The answer is: 5.", r"so \boxed{5}", True),
    ("The answer is: 5.\nThat was easy.", "5", True),
    ("The answer is: 5\nThat was easy", "5", False),
    (r"First \boxed{4}. The answer is: 5", "5", True),
    (r"The answer is: 5. Or \boxed{4}", "5", False),
    (r"First \boxed{4}, then $\boxed{5}$.", "5", True),
    (r"First \boxed{5}, then $\boxed{4}$.", "5", False),
    (r"$\boxed 5$", "5", True),
    (r"$\fbox{5}$", "5", True),
    (r"$\boxed{\frac{1}{\sqrt{2}}}$", r"\frac{1}{\sqrt{2}}", True),
    (r"$\boxed{\left\{ 1, \frac{2}{3} \right\}}$", r"\{1,\frac{2}{3}\}", True),
    (r"$\boxed{5", "5", False),
    ("It is 5", "5", False),
    ("", "5", False),
    ("The answer is:", "5", False),
    # What is the same.
    (r"The answer is: \frac12", r"\frac{1}{2}", True),
    (r"The answer is: \dfrac{1}{2}", r"\tfrac12", True),
    (r"The answer is: \frac1{72}", r"\frac{1}{72}", True),
    (r"The answer is: \frac34x", r"\frac{3}{4}x", True),
    ("The answer is: 1/2", r"\frac{1}{2}", True),
    ("The answer is: -1/2", r"\frac{-1}{2}", True),
    ("The answer is: 0.5", r"\frac{1}{2}", True),
    ("The answer is: .5", r"\frac{1}{2}", True),
    ("The answer is: .25", "0.25", True),
    (r"The answer is: \sqrt3", r"\sqrt{3}", True),
    (r"The answer is: 2\sqrt2+\sqrt3", r"2\sqrt{2}+\sqrt{3}", True),
    (r"The answer is: \left( 1, 2 \right)", "(1,2)", True),
    (r"The answer is: 90^\circ", "90", True),
    (r"The answer is: 90^{\circ}", "90", True),
    (r"The answer is: 5\text{ cm}", "5", True),
    (r"The answer is: 5\text{ cm}^2", "5", True),
    (r"The answer is: \$5", "5", True),
    (r"The answer is: 50\%", "50", True),
    ("The answer is: x = 5", "5", True),
    ("The answer is: k=5", "5", True),
    (r"The answer is: 10,\!000", "10,000", True),
    (r"The answer is: \text{Evelyn}", r"\text{Evelyn}", True),
    (r"The answer is: \begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    ("The answer is: x / 2", "x/2", True),
    # What is another.
    ("The answer is: 6", "5", False),
    ("The answer is: -5", "5", False),
    ("The answer is: 1/3", r"\frac{1}{2}", False),
    ("The answer is: xy = 5", "5", False),
    ("The answer is: x = y = 5", "5", False),
    ("The answer is: 02/4", r"\frac{2}{4}", False),
    # Right, and rejected all the same.
    ("The answer is: 10,000", "10000", False),
    ("The answer is: 10{,}000", "10,000", False),
    ("The answer is: 0.25", r"\frac{1}{4}", False),
    ("The answer is: 2/4", r"\frac{1}{2}", False),
    ("The answer is: -0.5", r"-\frac{1}{2}", False),
    (r"The answer is: \frac{1}{\pi}", r"\frac1\pi", False),
    (r"The answer is: \sqrt 3", r"\sqrt{3}", False),
    ("The answer is: 50%", r"50\%", False),
    ("The answer is: $5$", "5", False),
    (r"The answer is: $\boxed{5}$", "5", False),
    ("The answer is: (a)", r"\text{(a)}", False),
    (r"The answer is: x \in [1,2]", "[1,2]", False),
    ("The answer is: 2,1", "1,2", False),
    ("The answer is: 1+x", "x+1", False),
    ("The answer is: 5 cm", r"5\text{ cm}", False),
    # Wrong, and accepted all the same.
    (r"The answer is: 3\text{ cm}", r"3\text{ m}", True),
    (r"The answer is: 50\%", "50", True),
    ("The answer is: y=5", "x=5", True),
)

_TRUTH: tuple[Case, ...] = (
    ("true", "true", True),
    ("the correct answer is true", "true", True),
    ("the correct answer is true", "false", False),
    ("True.", "true", True),
    ("FALSE", "false", True),
    ("false, it is not true", "false", True),
    ("false, it is not true", "true", False),
    ("it is not true", "true", True),
    ("untrue, so false", "false", True),
    ("falsely", "false", False),
    ("yes", "true", False),
    ("", "false", False),
)

_ANSWERS: tuple[Case, ...] = (
    ("the correct answer is answer2", "answer2", True),
    ("the correct answer is answer2", "answer1", False),
    ("Answer2: a bear", "answer2", True),
    ("(answer2)", "answer2", True),
    ("answer2\nanswer1", "answer2", True),
    ("answer1/answer2", "answer2", False),
    ("answer12", "answer1", False),
    ("answer12 or answer2", "answer2", True),
    ("answer6", "answer5", False),
    ("answer5", "answer5", True),
    ("answer 2", "answer2", False),
    ("2", "answer2", False),
    ("B", "answer2", False),
    ("", "answer1", False),
)


def _renamed(name: str) -> tuple[Case, ...]:
    """The cases of the first two choices under another name."""

    def renamed(text: str) -> str:
        return text.replace("answer", name).replace("Answer", name.capitalize())

    return tuple(
        (renamed(text), renamed(reference), right) for text, reference, right in _ANSWERS if reference[-1] in "12"
    )


WORKED: dict[str, tuple[Case, ...]] = {
    "gsm8k": _NUMBERS,
    "math": _LATEX,
    "boolq": _TRUTH,
    "piqa": _renamed("solution"),
    "siqa": _ANSWERS,
    "hellaswag": _renamed("ending"),
    "winogrande": _renamed("option"),
    "arc": _ANSWERS,
    "openbookqa": _ANSWERS,
}
"""The cases of each set."""
