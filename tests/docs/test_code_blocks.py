"""Every code block of the README and of docs/ does what a reader would see when he copies it."""

from __future__ import annotations

import pytest
from code_blocks import (
    CHECKED_OTHERWISE,
    LANGUAGES,
    PAGES,
    ROOT,
    STAND_INS,
    Block,
    Reader,
    blocks_of,
    checked_otherwise,
    commands,
    inline_commands,
)

WITH_CODE = [page for page in PAGES if blocks_of(page)]
ALL = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """In an empty directory, with an empty cache."""
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Reader(folder)


@pytest.mark.slow
# Trainer pins memory for a card, which a reader has and CI has not.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_the_other(page, reader):
    for block in blocks_of(page):
        reader.run(block)


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_block_has_a_language_that_is_run_or_is_plain_text(block):
    assert block.language in LANGUAGES, f"{block}: found {block.language!r}, expected one of {', '.join(LANGUAGES)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_within_a_sentence_can_work(page):
    assert [command for command in inline_commands(page) if not checked_otherwise(command)] == []


def test_commands_within_sentences_are_found():
    assert "make demo" in inline_commands(ROOT / "docs" / "quality.md")


def test_a_block_without_a_language_or_indented_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A\n\n```\na\n```\n\n- b\n\n  ```python\n  c\n  ```\n\ntext\n\n    d\n", encoding="utf-8")
    assert [(block.language, block.text, block.line) for block in blocks_of(page)] == [
        ("", "a\n", 4),
        ("python", "c\n", 10),
        ("", "d\n", 15),
    ]


def test_a_block_that_fails_is_noticed(reader):
    failing = [("python", "assert False", AssertionError), ("json", "{", ValueError)]
    failing += [("sh", text, AssertionError) for text in ("false", "qsvft info nowhere")]
    for language, text, error in failing:
        with pytest.raises(error):
            reader.run(Block(ROOT / "README.md", language, text, 1))


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "python benchmarks/forms.py --no-such-option",
        "python benchmarks/forms.py --size large",
        "pip install something-else",
        "benchmarks/gpu/no-such-script.sh",
    ],
)
def test_a_command_that_is_not_run_is_refused_where_it_cannot_work(reader, command):
    with pytest.raises((AssertionError, SystemExit)):
        reader.run(Block(ROOT / "README.md", "sh", command, 1))


def test_the_tables_hold_nothing_that_no_page_needs():
    text = "\n".join(block.text for block in ALL)
    assert [name for name in STAND_INS if name not in text] == []
    run = [command for block in ALL if block.language == "sh" for command in commands(block.text)]
    assert [start for start, _, _ in CHECKED_OTHERWISE if not any(c.startswith(start) for c in run)] == []


def test_the_readme_is_short_and_names_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 125
    named = [command.split("#")[0].strip() for b in blocks_of(ROOT / "README.md") for command in commands(b.text)]
    assert {"make demo", "make test"} <= set(named)
