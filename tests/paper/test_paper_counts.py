"""What is counted is what the paper says, or the experiment says why not."""

import json

import pytest
import torch

from benchmarks.paper.counts import agrees, as_written, counted, shape, table
from benchmarks.paper.experiment import names, read_experiment

EXPERIMENTS = {name: read_experiment(name) for name in names()}
CASES = {}
"""What is counted once for all experiments that mean the same: shapes and options, and what the paper says of them."""
for _experiment in EXPERIMENTS.values():
    for _method in _experiment.methods.values():
        _key = json.dumps([_experiment.shapes, _method.way, dict(_method.options), _method.paper.get("trained")])
        CASES.setdefault(_key, (_experiment, _method))
SAID = [
    pytest.param(experiment, method, id=f"{experiment.name}-{method.name}")
    for experiment, method in CASES.values()
    if "trained" in method.paper
]


@pytest.mark.parametrize(("experiment", "method"), SAID)
def test_a_count_is_the_papers_or_it_is_said_why_not(experiment, method):
    count = counted(experiment, method)
    same = agrees(count, method.paper["trained"])
    assert same == (method.counts is None), f"{count:,} counted, {method.paper['trained']} in the paper"
    assert same or method.counts.startswith(f"{count:,}")


def test_only_a_count_of_the_paper_is_explained():
    explained = [one for experiment in EXPERIMENTS.values() for one in experiment.methods.values() if one.counts]
    assert explained and all("trained" in one.paper for one in explained)


def test_each_method_can_be_counted():
    for experiment, method in CASES.values():
        count = counted(experiment, method)
        assert (count == 0) == (method.way == "head"), f"{experiment.name}: {method.name}"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("table-1-gemma-2b", "Full fine-tuning"),
        ("table-1-gemma-2b", "SVFT random"),
        ("table-1-gemma-2b", "VeRA r=1024"),
        ("table-1-gemma-2b", "qsvft"),
        ("table-3-rte", "DoRA r=4"),
        ("table-4-food101-vit-b", "BOFT b=2 m=2"),
        ("table-4-food101-vit-b", "SVFT banded d=8"),
    ],
)
def test_two_layers_tell_what_all_of_them_have(name, method):
    experiment = EXPERIMENTS[name]
    chosen = experiment.methods[method]
    whole = shape(experiment).num_hidden_layers
    assert counted(experiment, chosen) == counted(experiment, chosen, layers=whole)


# By the formulas of the paper's Table 7 and of its appendix, on Gemma-2B's seven kinds of matrix.
SIDES = {"q": (2048, 2048), "k": (256, 2048), "v": (256, 2048), "o": (2048, 2048)}
SIDES |= {"gate": (16384, 2048), "up": (16384, 2048), "down": (2048, 16384)}


@pytest.mark.parametrize("d", [0, 8, 16])
def test_svft_counts_by_the_papers_formula(d):
    name = {0: "SVFT plain", 8: "SVFT banded d=8", 16: "SVFT banded d=16"}[d]
    widths = [min(sides) for sides in SIDES.values()]
    formula = 18 * sum(k * (2 * d + 1) - d * (d + 1) for k in widths)
    experiment = EXPERIMENTS["table-5-gemma-2b"]
    assert counted(experiment, experiment.methods[name]) == formula


@pytest.mark.parametrize(("rank", "dora"), [(32, False), (16, True), (1, False)])
def test_lora_and_dora_count_by_their_formulas(rank, dora):
    experiment = EXPERIMENTS["table-1-gemma-2b"]
    adapted = [SIDES[name] for name in ("q", "k", "v", "up", "down")]
    formula = 18 * sum(rank * (m + n) + (m if dora else 0) for m, n in adapted)
    assert counted(experiment, experiment.methods[f"{'DoRA' if dora else 'LoRA'} r={rank}"]) == formula


def test_a_count_holds_no_value_and_no_head():
    experiment = EXPERIMENTS["table-3-rte"]
    before = torch.get_rng_state()
    assert counted(experiment, experiment.methods["SVFT plain"]) == 12 * 6 * 768
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("count", "written"),
    [
        (2_506_172_416, "2.5B"),
        (26_247_168, "26.2M"),
        (626_688, "0.63M"),
        (24_576, "24.6K"),
        (3_281_040, "3.28M"),
    ],
)
def test_a_count_is_written_as_the_paper_writes_it(count, written):
    assert as_written(count) == written and agrees(count, written)


@pytest.mark.parametrize(
    ("count", "written", "same"),
    [
        (3_281_040, "3.3M", True),
        (193_536, "0.2M", True),
        (1_198_080, "1.19M", False),
        (193_536, "0.18M", False),
        (183_831_552, "184M", True),
        (8_030_261_248, "8.0B", True),
        (193_536, "193.5M", False),
    ],
)
def test_a_count_agrees_where_it_is_the_same_rounded_to_the_digits_that_are_printed(count, written, same):
    assert agrees(count, written) is same


def test_what_is_no_written_number_is_refused():
    with pytest.raises(ValueError, match=r"trained: found '26,2M'; expected a number such as 0\.19M"):
        agrees(1, "26,2M")


def test_an_experiment_without_shapes_is_refused_by_name(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "about: own\nkind: language\nmodel: here\ntrain: {dataset: d}\nasked: {A: {dataset: d}}\n"
        "methods: {Full: {way: full}}\n"
    )
    experiment = read_experiment(str(path))
    with pytest.raises(ValueError, match="own: shapes: found none; expected a preset of qsvft profile"):
        counted(experiment, experiment.methods["Full"])


def test_the_table_has_a_row_for_each_method():
    experiment = EXPERIMENTS["table-6-pythia-143k"]
    columns = [list(column.cells) for column in table([experiment.name]).columns]
    assert columns[1] == list(experiment.methods)
    rows = dict(zip(columns[1], zip(*columns, strict=True), strict=True))
    assert rows["LoRA r=4"][2:] == ("5,242,880", "5.24M", "")
    assert rows["Full fine-tuning"][4] == experiment.methods["Full fine-tuning"].counts
