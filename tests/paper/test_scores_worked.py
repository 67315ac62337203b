"""Every case that was worked by hand is judged as it says, and by the name of its set."""

import pytest

from benchmarks.paper.scores import SCORES
from benchmarks.paper.scores.worked import WORKED

CASES = [(name, *case) for name, cases in WORKED.items() for case in cases]


def test_every_set_has_a_score_and_cases_that_are_right_and_cases_that_are_wrong():
    assert SCORES.keys() == WORKED.keys()
    for cases in WORKED.values():
        assert {right for _, _, right in cases} == {True, False}


@pytest.mark.parametrize(("name", "text", "reference", "right"), CASES)
def test_a_case_is_judged_as_it_was_worked_by_hand(name, text, reference, right):
    assert SCORES[name].right(text, reference) is right
    assert not (right and SCORES[name].answer(text) is None)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("text", ["", "I do not know.", "\N{CJK UNIFIED IDEOGRAPH-4E00}"])
def test_a_text_without_an_answer_has_none(name, text):
    assert SCORES[name].answer(text) is None


@pytest.mark.parametrize("name", SCORES)
def test_a_reference_that_is_no_answer_of_the_set_is_refused(name):
    with pytest.raises(ValueError, match="reference"):
        SCORES[name].right("The answer is: 5", "")
