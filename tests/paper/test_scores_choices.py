"""Questions with choices: what holds of the first name in a text, and of the likeliest choice."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.paper.scores import SCORES
from benchmarks.paper.scores.choices import CHOICES, answer, likeliest, right

FINITE = st.floats(-1e6, 0)
EACH = pytest.mark.parametrize(("name", "choices"), CHOICES.items(), ids=list(CHOICES))


@EACH
def test_every_choice_is_found_under_the_name_of_its_set(name, choices):
    for choice in choices:
        for text in (choice, f"the correct answer is {choice}", f"{choice.upper()}.", f"\n({choice.capitalize()}):"):
            assert SCORES[name].answer(text) == choice
            assert [other for other in choices if SCORES[name].right(text, other)] == [choice]


@EACH
@given(after=st.text())
def test_the_first_name_counts_whatever_follows(name, choices, after):
    for choice in choices:
        assert answer(f"{choice} {after}", choices) == choice


@EACH
def test_a_name_is_a_whole_word(name, choices):
    for choice in choices:
        assert [answer(text, choices) for text in (f"un{choice}", f"{choice}2", f"{choice}ly", f"a_{choice}")] == [
            None
        ] * 4


@EACH
@pytest.mark.parametrize("reference", ["", "Answer1", "True", "B", "answer 1"])
def test_a_reference_that_is_no_choice_is_refused(name, choices, reference):
    with pytest.raises(ValueError, match=f"the reference is '{reference}'; expected one of {choices[0]}, "):
        right(choices[0], reference, choices)


@given(st.lists(FINITE, min_size=1, max_size=6))
def test_the_likeliest_choice_is_the_first_of_the_greatest(values):
    best = likeliest(values)
    assert values[best] == max(values) and max(values) not in values[:best]


@given(st.lists(st.tuples(FINITE, st.integers(1, 100)), min_size=1, max_size=6))
def test_by_length_it_is_the_likeliest_of_the_quotients(pairs):
    values, lengths = [value for value, _ in pairs], [length for _, length in pairs]
    assert likeliest(values, lengths) == likeliest([value / length for value, length in pairs])
    assert likeliest(values, [7] * len(values)) == likeliest([value / 7 for value in values])


def test_a_long_choice_wins_by_its_length_alone():
    assert likeliest([-10.0, -12.0]) == 0
    assert likeliest([-10.0, -12.0], [5, 12]) == 1


def test_an_impossible_choice_is_never_the_likeliest_unless_all_are():
    assert likeliest([-math.inf, -1e9]) == 1
    assert likeliest([-math.inf, -math.inf]) == 0


@pytest.mark.parametrize(
    ("values", "lengths", "said"),
    [
        ([], None, "found no log probabilities"),
        ([-1.0, math.nan], None, "found NaN among the log probabilities"),
        ([-1.0, -2.0], [1], "found 1 lengths of 2 choices"),
        ([-1.0, -2.0], [1, 0], "found a choice of length 0"),
    ],
)
def test_what_has_no_likeliest_choice_is_refused(values, lengths, said):
    with pytest.raises(ValueError, match=said):
        likeliest(values, lengths)
