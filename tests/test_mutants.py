"""The mutants still fit the sources: each line to change is there once, and the changed file compiles."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def load():
    spec = importlib.util.spec_from_file_location("mutants", HERE / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


mutants = load()
EACH = pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)


def test_there_are_at_least_ten_different_mutants():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 10
    assert len({(mutant.file, mutant.old) for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)


@EACH
def test_the_text_to_change_is_found_exactly_once_and_the_changed_file_compiles(mutant, tmp_path):
    path = tmp_path / mutant.place
    path.parent.mkdir(parents=True)
    shutil.copy(mutants.ROOT / mutant.place, path)
    before = path.read_text(encoding="utf-8")
    mutant.apply(tmp_path)
    after = path.read_text(encoding="utf-8")
    assert after != before and mutant.old not in after
    compile(after, mutant.file, "exec")


@EACH
def test_the_tests_that_must_notice_exist(mutant):
    assert mutant.tests
    for name in mutant.tests:
        file, _, function = name.partition("::")
        assert f"def {function}" in (HERE / file).read_text(encoding="utf-8")


def test_a_text_that_is_not_there_or_there_twice_is_refused(tmp_path):
    (tmp_path / "qsvft").mkdir()
    (tmp_path / "qsvft" / "file.py").write_text("a = 1\na = 1\n")
    for old, count in (("b", 0), ("a", 2)):
        with pytest.raises(ValueError, match=f"found it {count} times"):
            mutants.Mutant("name", "file.py", old, "c", ()).apply(tmp_path)
