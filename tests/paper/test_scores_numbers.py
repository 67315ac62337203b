"""GSM8K: what holds of the number of a solution, whatever the number and the text around it."""

from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from benchmarks.paper.scores.numbers import LONGEST, answer, final_number, reference_number, right

WHOLE = st.integers(-(10**18), 10**18)
MARKED = (
    "The answer is: {}",
    "The answer is {}.",
    "#### {}",
    "The answer is: {} apples",
    "so 5.\n#### {}\nThe answer is: {}",
)


@given(WHOLE, st.sampled_from((*MARKED, "It is {}.")))
def test_separators_of_thousands_never_matter(number, form):
    written = form.replace("{}", f"{number:,}")
    assert final_number(written) == final_number(form.replace("{}", str(number))) == number
    assert right(written, f"so\n#### {number}") and right(form.replace("{}", str(number)), f"#### {number:,}")


@given(st.text(), WHOLE, st.sampled_from(MARKED))
@example("The answer is", 5, "#### {}")
@example("####", -5, "The answer is: {}")
@example("The answer is: 7\n#### 7", 0, "#### {}")
def test_a_right_answer_stays_right_with_any_text_in_front(before, number, form):
    assert right(f"{before}\n{form.replace('{}', str(number))}", f"#### {number}")


@given(st.text(), WHOLE)
def test_without_a_mark_the_last_number_counts_whatever_is_in_front(before, number):
    assume("The answer is" not in before and "####" not in before)
    assert final_number(f"{before}\n{number}") == number


@given(st.text())
def test_any_text_at_all_has_a_number_or_none(text):
    found = final_number(text)
    assert found is None or isinstance(found, Fraction)
    assert answer(text) == (None if found is None else str(found))


@given(WHOLE, st.integers(1, 10**9))
def test_a_fraction_is_read_exactly_and_with_a_whole_number_before_it(top, bottom):
    assert final_number(f"The answer is: {top}/{bottom}") == Fraction(top, bottom)
    assert final_number(f"The answer is: 7 {abs(top)}/{bottom}") == 7 + Fraction(abs(top), bottom)
    assert final_number(f"The answer is: -7\\frac{{{abs(top)}}}{{{bottom}}}") == -7 - Fraction(abs(top), bottom)


@given(st.decimals(-(10**6), 10**6, places=3))
def test_zeros_behind_the_point_never_matter(number):
    assert final_number(f"The answer is: {number}00") == final_number(f"#### {number}") == Fraction(number)


@given(WHOLE, WHOLE)
def test_another_number_is_wrong(number, other):
    assume(number != other)
    assert not right(f"#### {other}", f"#### {number}")


def test_more_digits_than_python_reads_are_no_number():
    assert final_number("#### " + "9" * LONGEST) is not None
    assert final_number("#### " + "9" * (LONGEST + 1)) is final_number("#### " + "9" * 10_000) is None


@pytest.mark.parametrize(
    "reference", ["", "#### ", "#### many", "#### 5 apples", "so it is 5", "#### 1/0", "#### 5:30"]
)
def test_a_reference_that_is_not_one_number_is_refused_with_its_text(reference):
    with pytest.raises(ValueError, match="GSM8K: the reference ends with"):
        reference_number(reference)
    with pytest.raises(ValueError, match="GSM8K: the reference ends with"):
        right("I do not know.", reference)
