"""What the pages say of bytes, options and files is what the code says."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from dataclasses import dataclass, fields

import pytest
import quantised_bases
from code_blocks import PAGES, ROOT
from pages import named_paths, table_with

import qsvft
from qsvft.cli.prepare import prepare as prepare_command
from qsvft.memory.methods import parse_method
from qsvft.memory.presets import model_config
from qsvft.memory.scenario import count_step
from qsvft.options.adapter import OPTIONS
from qsvft.options.option import INTEGER, declared, option
from qsvft.options.switches import SWITCHES

sys.path.insert(0, str(ROOT / "docs"))
import option_table

BUDGETS = json.loads((ROOT / "benchmarks" / "memory" / "budgets.json").read_text())["budgets"]
MODELS = {"Llama-2-7B": "llama-2-7b", "Llama-3-8B": "llama-3-8b"}
GIB = 2**30
MEMORY_ROWS = [
    pytest.param(row["method"].strip("`"), model, float(row[heading]), id=f"{page}-{row['method']}-{model}")
    for page in ("README.md", "docs/memory.md")
    for row in table_with(page, "method", *MODELS)
    for heading, model in MODELS.items()
]


def counted_peak(model: str, method: str) -> int:
    """Bytes at the peak: of the memory gate's budget where there is one, counted anew elsewhere."""
    budget = BUDGETS.get(f"{model} | 2048 tokens | checkpointing on | {method}")
    if budget is not None:
        return budget["peak"]
    ledger, _ = count_step(model_config(model), parse_method(method), 1, 2048, True)
    return ledger.peaks()["total"].nbytes


@pytest.mark.parametrize(("method", "model", "gib"), MEMORY_ROWS)
def test_a_row_of_the_memory_tables_is_what_the_ledger_counts(method, model, gib):
    assert f"{counted_peak(model, method) / GIB:.2f}" == f"{gib:.2f}"


def test_the_gate_holds_as_many_steps_as_the_page_says():
    assert f"any of {len(BUDGETS)} steps grows by a byte" in (ROOT / "docs" / "memory.md").read_text()


def test_both_memory_tables_are_read():
    assert len(MEMORY_ROWS) == 2 * (6 + 17)


SPEED = json.loads((ROOT / "benchmarks" / "results" / "speed" / "cpu" / "speed.json").read_text())
STEPS = {"1024 wide": "Llama 1024 wide", "Llama-3-8B's shapes": "Llama-3-8B", "SmolLM2-135M": "smollm2"}
SPEED_CELLS = [
    pytest.param(row["timed as"].strip("`"), case, row[heading], id=f"{row['timed as']}-{heading}")
    for row in table_with("docs/speed.md", "timed as", *STEPS)
    for heading, case in STEPS.items()
    if row[heading]
]


@pytest.mark.parametrize(("method", "model", "cell"), SPEED_CELLS)
def test_a_cell_of_the_speed_table_was_measured(method, model, cell):
    (found,) = [row["methods"] for row in SPEED["rows"] if row["case"].split(" | ")[1].startswith(model)]
    one = found[method]
    ratio = f"{one['ratio']:.2f} ({one['ratio_p20']:.2f} to {one['ratio_p80']:.2f})"
    assert cell == (f"1 ({one['median_ms'] / 1000:.1f} s)" if one is found[SPEED["rows"][0]["unit"]] else ratio)


def test_the_steps_that_were_measured_again_have_their_cells():
    path = ROOT / "benchmarks" / "results" / "speed" / "cpu-again" / "speed.json"
    measured = json.loads(path.read_text())["rows"]
    said = table_with("docs/speed.md", "again", "Llama-3-8B's shapes", "SmolLM2-135M")
    assert {row["again"].strip("`") for row in said} == set(measured[0]["methods"])
    for row in said:
        for heading, found in zip(("Llama-3-8B's shapes", "SmolLM2-135M"), measured, strict=True):
            one = found["methods"][row["again"].strip("`")]
            ratio = f"{one['ratio']:.2f} ({one['ratio_p20']:.2f} to {one['ratio_p80']:.2f})"
            assert row[heading] in (ratio, f"1 ({one['median_ms'] / 1000:.1f} s)")


def test_every_measured_step_has_a_cell():
    assert len(SPEED_CELLS) == sum(len(row["methods"]) for row in SPEED["rows"])


GROWTH = json.loads((ROOT / "benchmarks" / "results" / "speed" / "cpu-growth" / "speed.json").read_text())["rows"]


def test_what_the_speed_page_says_of_growth_was_measured():
    grown = [(row["axis"], part) for row in GROWTH if row["stage"] == "growth" for part in row["rows"]]
    assert {axis for axis, _ in grown} == {"tokens", "rank", "width", "layers", "vocabulary"}
    for axis, part in grown:
        over = part["exponent"] - part["asked"]
        assert over <= (0.01 if part["unit"] == "bytes" else 0.0) or (axis, part["of"]) == ("layers", "step"), part
    layers = [part for axis, part in grown if axis == "layers"]
    steps = [(round(part["exponent"], 2), round(part["asked"], 2)) for part in layers if part["unit"] == "ms"]
    assert [(min(of), max(of)) for of in zip(*steps, strict=True)] == [(0.93, 0.98), (0.91, 0.95)]
    saved = [round(part["exponent"], 1) for part in layers if part["of"] == "saved activations"]
    assert (min(saved), max(saved)) == (0.1, 0.2)


def test_a_compiled_step_of_the_speed_page_was_measured():
    said = table_with("docs/speed.md", "compiled", "as it is", "`torch.compile`")
    measured = [row for row in GROWTH if row["stage"] == "compiled"]
    assert len(said) == len(measured) == 2
    for row, found in zip(said, measured, strict=True):
        eager, one = found["methods"]["as it is"], found["methods"]["torch.compile"]
        assert row["compiled"].endswith(f"{found['tokens']} tokens")
        assert row["as it is"] == f"1 ({eager['median_ms'] / 1000:.2f} s)"
        assert row["`torch.compile`"] == f"{one['ratio']:.2f} ({one['ratio_p20']:.2f} to {one['ratio_p80']:.2f})"


def test_what_one_product_for_a_group_saves_was_measured():
    path = ROOT / "benchmarks" / "results" / "speed" / "cpu-grouped" / "speed.json"
    found = [row["methods"] for row in json.loads(path.read_text())["rows"]]
    pairs = [(methods["a product each"], methods["one product of all"]) for methods in found]
    ratios = [one["ratio"] for _, one in pairs]
    saved = max(each["median_ms"] - one["median_ms"] for each, one in pairs)
    page = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} of the time" in page
    assert f"saves at most {saved:.1f} ms a layer" in page


def test_the_claim_of_the_readme_stands_beside_its_settings():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (claim,) = [part for part in readme.split("\n\n") if "5.65 GiB" in part]
    settings = ("predicted", "Llama-3-8B", "`quantize_embeddings=8`", "2048 tokens", "batch 1")
    assert [words for words in (*settings, "checkpointing", "chunked loss") if words not in claim] == []
    peak = counted_peak("llama-3-8b", "qsvft:quantize_embeddings=8")
    assert f"{peak / GIB:.2f} GiB" == "5.65 GiB"


ROWS = {row["option"].strip("`"): row for row in table_with("docs/options.md", "option", "given in")}
KEYWORDS = {
    name: parameter.default
    for name, parameter in inspect.signature(qsvft.prepare).parameters.items()
    if name not in ("model", "config", "adapter_name", "calibration", "progress", "options")
}


def given_in(place: str) -> set[str]:
    return {name for name, row in ROWS.items() if place in row["given in"].split(", ")}


def test_the_option_table_has_every_option_with_its_default():
    assert {name: ast.literal_eval(row["default"].strip("`")) for name, row in ROWS.items()} == KEYWORDS
    assert given_in("config") == set(ROWS) & {field.name for field in fields(qsvft.QSVFTConfig)}
    assert given_in("keyword") == set(ROWS) - given_in("config")


def test_the_option_table_says_what_the_command_takes():
    own = {"source", "target", "dtype", "workers", "device", "revision", "dry_run"}
    assert given_in("command") == set(inspect.signature(prepare_command).parameters) - own


def test_recommend_takes_what_the_option_table_says():
    fixed = {name: KEYWORDS[name] for name in given_in("recommend") if KEYWORDS[name] is not None}
    assert set(qsvft.recommend("tiny", card_gib=8, **fixed).fixed) == set(fixed)
    for name in set(ROWS) - given_in("recommend"):
        with pytest.raises(ValueError, match=name):
            qsvft.recommend("tiny", card_gib=8, **{name: KEYWORDS[name]})


def test_the_profiler_takes_what_the_option_table_says():
    with pytest.raises(ValueError, match="qsvft takes ") as refused:
        parse_method("qsvft:no_such_option=1")
    assert given_in("method") == set(str(refused.value).partition("qsvft takes ")[2].split(", "))


def test_the_option_table_is_the_one_that_the_declarations_make():
    page = option_table.PAGE.read_text(encoding="utf-8")
    made = option_table.table(OPTIONS.values(), SWITCHES.values())
    assert page == option_table.page_with(page, made), "make pictures writes it anew"


def test_a_new_option_comes_into_the_option_table_by_its_declaration():
    @dataclass
    class Owner:
        made_up: int = option(3, INTEGER, "What it is.", "3 or more", lambda value: value >= 3, of_factors=True)

    made = option_table.table([*OPTIONS.values(), *declared(Owner).values()], SWITCHES.values())
    (row,) = [line for line in made.splitlines() if "made_up" in line]
    assert row == "| `made_up` | `3` | 3 or more | config, command | What it is. |"


def test_the_table_of_bases_is_the_one_that_is_tested():
    page = quantised_bases.PAGE.read_text(encoding="utf-8")
    assert page == quantised_bases.page_with(page), "python tests/quantised_bases.py writes it anew"


def test_each_column_of_the_table_of_bases_is_a_test_of_every_base():
    tree = ast.parse((ROOT / "tests" / "tuner" / "test_bases.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    tests = {one.name for one in functions if "EACH_BASE" in map(ast.unparse, one.decorator_list)}
    assert tests == set(quantised_bases.COLUMNS.values())
    assert len({base.name for base in quantised_bases.BASES}) == len(quantised_bases.BASES)


def test_a_base_without_a_row_or_a_row_without_a_base_is_seen():
    page, bases = quantised_bases.PAGE.read_text(encoding="utf-8"), quantised_bases.BASES
    last = f"| {' | '.join((bases[-1].name, *bases[-1].cells()))} |\n"
    for changed in (page.replace(last, ""), page.replace(last, last + last), page.replace("| dense |", "| NF4 |", 1)):
        assert changed != page == quantised_bases.page_with(changed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    missing = [name for where, name in named_paths() if where == page and not (ROOT / name).exists()]
    assert missing == []


def test_the_pages_name_files():
    assert len({name for _, name in named_paths()}) > 20
