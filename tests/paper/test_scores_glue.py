"""GLUE's figures are those of their formulas, and what they cannot say is 0 or refused, never NaN."""

import math
import sys
import warnings

import numpy
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.paper.scores.glue import GLUE, accuracy, f1, figures, matthews, pearson, spearman

CLASSES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)
# STS-B's are from 0 to 5; steps of a hundredth make ties.
SIMILARITIES = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=2, max_size=40)
CORRELATIONS = (pearson, spearman)
TASKS = pytest.mark.parametrize("task", GLUE)


def counts(predictions, references):
    """True and false positives, false and true negatives."""
    pairs = list(zip(predictions, references, strict=True))
    return tuple(pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))


def ranks(values):
    """The mean place of each value among all in order."""
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


@given(CLASSES)
def test_the_figures_of_two_classes_are_those_of_their_counts(pairs):
    predictions, references = zip(*pairs, strict=True)
    tp, fp, fn, tn = counts(predictions, references)
    assert accuracy(predictions, references) == pytest.approx((tp + tn) / len(pairs))
    assert f1(predictions, references) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0)
    assume(len(set(references)) == 2)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(product) if product else 0
    assert matthews(predictions, references) == pytest.approx(expected, abs=1e-12)


@given(SIMILARITIES)
def test_the_correlations_are_those_of_the_values_and_of_their_ranks(pairs):
    predictions, references = ([value / 100 for value in values] for values in zip(*pairs, strict=True))
    assume(len(set(predictions)) > 1 and len(set(references)) > 1)
    assert pearson(predictions, references) == pytest.approx(numpy.corrcoef(predictions, references)[0, 1], abs=1e-9)
    of_ranks = numpy.corrcoef(ranks(predictions), ranks(references))[0, 1]
    assert spearman(predictions, references) == pytest.approx(of_ranks, abs=1e-9)


def test_cases_worked_by_hand():
    predictions, references = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert accuracy(predictions, references) == pytest.approx(3 / 5)
    assert f1(predictions, references) == pytest.approx(2 / 3)
    assert matthews(predictions, references) == pytest.approx(1 / 6)
    assert f1([1, 0], [1, 1]) != f1([0, 1], [0, 0])
    assert pearson([1, 2, 3], [1, 2, 9]) == pytest.approx(8 / math.sqrt(2 * 38))
    assert spearman([1, 2, 3], [1, 2, 9]) == pytest.approx(1)
    assert spearman([3, 2, 1], [1, 2, 9]) == pytest.approx(-1)


@TASKS
def test_every_task_has_its_figures_and_perfect_predictions_have_1_in_each(task):
    references = [0, 1, 1, 0, 1]
    names = {
        "cola": {"matthews"},
        "stsb": {"pearson", "spearman"},
        "mrpc": {"accuracy", "f1"},
        "qqp": {"accuracy", "f1"},
    }
    assert figures(task, references, references) == pytest.approx(dict.fromkeys(names.get(task, {"accuracy"}), 1))


def test_mnli_counts_three_classes():
    assert figures("mnli_matched", [0, 1, 2, 2], [0, 1, 2, 1]) == {"accuracy": 3 / 4}


@pytest.mark.parametrize("correlation", [*CORRELATIONS, matthews])
@pytest.mark.parametrize("value", [0, 1])
def test_predictions_that_are_all_the_same_have_no_correlation_and_no_warning(correlation, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert correlation([value] * 4, [0, 1, 1, 0]) == 0


@pytest.mark.parametrize("correlation", [*CORRELATIONS, matthews])
def test_references_that_are_all_the_same_are_refused_for_a_correlation(correlation):
    with pytest.raises(ValueError, match="all 3 references are 1; a correlation needs two different ones"):
        correlation([0, 1, 0], [1, 1, 1])


@TASKS
@pytest.mark.parametrize(
    ("predictions", "references", "said"),
    [
        ([], [], "found 0 predictions of 0 references"),
        ([0, 1], [0, 1, 1], "found 2 predictions of 3 references"),
        ([0, math.nan], [0, 1], "found nan in row 1 of the predictions"),
        ([0, math.inf], [0, 1], "found inf in row 1 of the predictions"),
        ([0, 1], [math.nan, 1], "found nan in row 0 of the references"),
    ],
)
def test_what_has_no_figures_is_refused_with_the_name_of_the_task(task, predictions, references, said):
    with pytest.raises(ValueError, match=f"^{task}: {said}"):
        figures(task, predictions, references)


@pytest.mark.parametrize("task", sorted(GLUE.keys() - {"stsb"}))
def test_scores_in_place_of_classes_are_refused(task):
    with pytest.raises(ValueError, match=rf"^{task}: found 0.7 in row 1 of the predictions; expected classes"):
        figures(task, [0, 0.7], [0, 1])


@pytest.mark.parametrize("other", [2, -100])
def test_a_third_class_is_refused_for_f1(other):
    with pytest.raises(ValueError, match=rf"^mrpc: F1: found the classes \[{other}\]; expected 0 and 1 alone"):
        figures("mrpc", [0, 1], [0, other])


def test_a_task_that_is_none_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="found the task 'mnli'; expected one of cola, "):
        figures("mnli", [0], [0])


def test_without_the_libraries_it_says_what_to_install(monkeypatch):
    for name, figure in (("sklearn.metrics", accuracy), ("scipy.stats", pearson)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'qsvft\[paper\]'"):
            figure([0, 1], [0, 1])
