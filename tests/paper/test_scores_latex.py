"""MATH: what holds of boxes and of answers with the same text, whatever is in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.paper.scores.latex import answer, boxed, normalised, reference_answer, right, same

WHOLE = st.integers(-999, 999).map(str)
PLAIN = st.one_of(WHOLE, st.sampled_from(("x", r"\pi", r"\infty", "0.5", "10,000")))
ANSWERS = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(r"\frac{{{0[0]}}}{{{0[1]}}}".format),
        inner.map(r"\sqrt{{{}}}".format),
        st.tuples(inner, inner).map("({0[0]},{0[1]})".format),
        inner.map(r"\{{{}\}}".format),
    ),
    max_leaves=6,
)
"""Answers as MATH writes them, with nothing left to be normalised but a single 0.5."""


@given(st.text(), ANSWERS)
def test_a_box_gives_what_is_in_it_whatever_is_in_front(before, inside):
    assert boxed(f"{before}\n$\\boxed{{{inside}}}$ }} and more") == inside


@given(st.text(), ANSWERS)
def test_a_right_answer_stays_right_with_any_text_in_front(before, written):
    assert right(f"{before}\nThe answer is: {written}", f"so $\\boxed{{{written}}}$.")


@given(ANSWERS, ANSWERS)
def test_sameness_does_not_depend_on_the_order(a, b):
    assert same(a, a) and same(a, normalised(a)) and normalised(normalised(a)) == normalised(a)
    assert same(a, b) == same(b, a) == (normalised(a) == normalised(b))


@given(st.text(), st.text())
def test_any_two_texts_at_all_are_the_same_or_not(a, b):
    assert same(a, a) and same(a, b) == same(b, a)
    assert answer(a) is None or answer(a).strip()


@given(ANSWERS)
def test_how_an_answer_is_set_never_matters(written):
    set_otherwise = (
        written.replace("frac", "dfrac").replace("(", r"\left( ").replace(")", r" \right)").replace(",", r",\! ")
    )
    assert same(set_otherwise, written)
    assert (
        same(f"{written}\\text{{ cm}}", written) and same(f"x = {written}", written) and same(f"\\${written}", written)
    )


@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_of_two_whole_numbers_may_stand_on_one_line(top, bottom):
    assert same(f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}")


@given(st.integers(0, 9), st.integers(0, 9))
def test_one_digit_needs_no_braces(a, b):
    assert same(f"\\frac{a}{b}", f"\\frac{{{a}}}{{{b}}}") and same(
        f"\\sqrt{a}+\\frac{b}{{x}}", f"\\sqrt{{{a}}}+\\frac{{{b}}}{{x}}"
    )


def test_only_a_text_without_a_box_has_its_frame_read():
    assert boxed(r"\fbox{4}") == "4"
    assert boxed(r"\boxed{5} \fbox{4}") == "5"
    assert boxed(r"\boxedtwice{4}") is None


def test_a_box_without_braces_ends_with_its_formula_or_its_line():
    assert boxed(r"$\boxed 5$ and $6$") == boxed("\\boxed 5\n6") == boxed(r"\boxed5") == "5"


def test_a_brace_that_latex_escapes_does_not_close_a_box():
    assert boxed(r"\boxed{\left\{ x \right.} and more}") == r"\left\{ x \right."
    assert boxed(r"\boxed{\left. x \right\}} and more") == r"\left. x \right\}"


def test_a_box_that_never_closes_is_no_answer_even_after_one_that_does():
    assert boxed(r"\boxed{5}, no, \boxed{4") is None


@pytest.mark.parametrize("broken", [r"\frac", r"\frac1", r"\sqrt", r"3\text{ m}\text{ s}", "/", "=", r"\frac{", ""])
def test_broken_latex_is_the_same_as_itself_and_as_nothing_else(broken):
    assert same(broken, broken) and not same(broken, "3")


@pytest.mark.parametrize("reference", ["", " ", r"so \boxed{", r"so \boxed{}", r"\fbox{"])
def test_a_reference_without_an_answer_is_refused_with_its_text(reference):
    with pytest.raises(ValueError, match="MATH: found no answer in the reference"):
        reference_answer(reference)
