"""Files that are written whole or not at all."""

import os

import pytest

from qsvft.storage.whole_files import check_file_writable, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("path", ["missing/report.json", ".", "file/report.json"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        check_file_writable(tmp_path / path)
