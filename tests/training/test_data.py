"""Rows come from anywhere in one of a few forms; what is wrong with them is said with the row's number."""

import json

import pytest
from datasets import Dataset, DatasetDict
from rows_of import rows_of, write_rows

from qsvft.options.run import RunOptions
from qsvft.training.data import load_rows, turn_by_turn

TEMPLATES = {"prompt": "Q: {question}\nA: ", "completion": "{answer} ({number})"}


def load(path, **options):
    return load_rows(RunOptions(dataset=str(path), **{"eval_share": 0.0, **options}))


def saved(folder, ending, rows):
    table, path = Dataset.from_list(rows), folder / f"rows{ending}"
    {".csv": table.to_csv, ".parquet": table.to_parquet, ".jsonl": table.to_json}[ending](str(path))
    return path


# datasets 4.7 opens a CSV for pandas, and leaves it to be closed when it is collected.
_LATE = "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
LEFT_OPEN = pytest.mark.filterwarnings(_LATE)


@LEFT_OPEN
@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_a_file_of_each_kind_gives_the_same_rows(tmp_path, ending):
    rows = rows_of("prompt")
    assert load(saved(tmp_path, ending, rows)).train.to_list() == rows


@LEFT_OPEN
def test_a_tsv_is_split_at_tabs(tmp_path):
    (tmp_path / "rows.tsv").write_text("prompt\tcompletion\na, b\tc\n")
    assert load(tmp_path / "rows.tsv").train.to_list() == [{"prompt": "a, b", "completion": "c"}]


def test_a_text_file_is_a_row_a_line(tmp_path):
    (tmp_path / "rows.txt").write_text("w1 w2\nw3\n")
    assert load(tmp_path / "rows.txt").train["text"] == ["w1 w2", "w3"]


def test_a_directory_of_files_and_a_saved_data_set_give_the_same_rows(tmp_path):
    rows = rows_of("text")
    (tmp_path / "files").mkdir()
    saved(tmp_path / "files", ".jsonl", rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:3])}).save_to_disk(tmp_path / "two")
    for place in ("files", "one", "two"):
        assert load(tmp_path / place).train.to_list() == rows
    assert load(tmp_path / "two", dataset_split="test").train.to_list() == rows[:3]
    with pytest.raises(ValueError, match="it has the splits train, test"):
        load(tmp_path / "two", dataset_split="valid")


def test_templates_make_the_columns_and_the_others_are_left_out(tmp_path):
    found = load(write_rows(tmp_path, "question"), templates=TEMPLATES).train
    row = rows_of("question")[0]
    assert found.column_names == ["prompt", "completion"]
    assert found[0]["prompt"] == f"Q: {row['question']}\nA: "
    assert found[0]["completion"] == f"{row['answer']} ({row['number']})"


def test_a_split_may_be_a_part(tmp_path):
    assert load(write_rows(tmp_path, "text"), dataset_split="train[:5]").train.to_list() == rows_of("text")[:5]


def test_rows_are_held_out_once_and_the_same_each_time(tmp_path):
    path = write_rows(tmp_path, "text", 50)
    first, again = (load(path, eval_share=0.2) for _ in range(2))
    assert first.held_out is not None and again.held_out is not None
    assert (len(first.train), len(first.held_out)) == (40, 10)
    assert first.held_out.to_list() == again.held_out.to_list()
    key = json.dumps
    assert sorted(map(key, [*first.train, *first.held_out])) == sorted(map(key, rows_of("text", 50)))


def test_rows_held_out_may_be_given(tmp_path):
    (tmp_path / "other").mkdir()
    other = write_rows(tmp_path / "other", "text", 3)
    found = load(write_rows(tmp_path, "text"), eval_dataset=str(other), eval_share=0.5)
    assert len(found.train) == 24 and found.held_out is not None and len(found.held_out) == 3


def test_rows_held_out_have_the_form_of_the_others(tmp_path):
    with pytest.raises(ValueError, match=r"prompt\.jsonl: found the columns \['prompt', 'completion'\]"):
        load(write_rows(tmp_path, "text"), eval_dataset=str(write_rows(tmp_path, "prompt")))


def test_preferences_are_of_their_own_form(tmp_path):
    path = write_rows(tmp_path, "preference")
    assert load(path, method="dpo").columns == ("prompt", "chosen", "rejected")
    with pytest.raises(ValueError, match="expected messages; or prompt and completion; or text"):
        load(path)


def test_each_thing_that_the_assistant_says_is_a_row():
    rows = Dataset.from_list(rows_of("messages"))
    found = turn_by_turn(rows)
    assert len(found) == 2 * len(rows)
    turns = rows[0]["messages"]
    assert found[0] == {"prompt": turns[:1], "completion": turns[1:2]}
    assert found[1] == {"prompt": turns[:3], "completion": turns[3:]}


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "found no rows|there are no rows|rows.jsonl"),
        ([{"a": "x"}], {}, "found the columns a; expected messages; or prompt and completion; or text"),
        ([{"text": "x"}, {"text": ""}], {}, "row 1: found text=''; expected a text, or turns"),
        ([{"text": "x"}, {"text": None}], {}, "row 1: found text=None"),
        ([{"prompt": "x", "completion": 3}], {}, "row 0: found completion=3"),
        ([{"messages": "hello"}], {}, "row 0: found messages='hello'; expected turns"),
        ([{"messages": [{"content": "x"}]}], {}, "row 0: found messages="),
        ([{"a": "x"}], {"templates": {"text": "{b}"}}, "templates: KeyError 'b'; expected names of columns of"),
        ([{"a": "x"}], {"templates": {"text": "{a"}}, "templates: ValueError"),
        ([{"text": "x"}], {"dataset_split": "valid"}, "Unknown split"),
    ],
)
def test_what_is_wrong_with_rows_is_said(tmp_path, rows, options, words):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match=words) as refused:
        load(path, **options)
    assert "rows.jsonl" in str(refused.value)


def test_a_damaged_file_says_where(tmp_path):
    path = write_rows(tmp_path, "text")
    path.write_text(path.read_text() + '{"text": "w4\n')
    with pytest.raises(ValueError, match=r"dataset '.*text\.jsonl': .+; expected rows of the split 'train'"):
        load(path)


@pytest.mark.parametrize("name", ["/no/such/rows.jsonl", "rows.parquet", "./rows"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match="there is no such file or directory"):
        load(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rows.xls").write_text("x")
    with pytest.raises(ValueError, match=r"the file's name ends in '\.xls'; known are \.json, \.jsonl"):
        load(tmp_path / "rows.xls")
