"""Of several processes one has a directory, as long as it lives."""

import errno
import os

import pytest
from filelock import FileLock

from qsvft.storage.only_process import only_process


def test_the_second_is_refused_with_the_directory_and_what_to_do(tmp_path):
    lock = tmp_path / "the.lock"
    words = f"^{tmp_path}: another process is cooking into this directory.*Wait for it, or give another pot.$"
    with (
        only_process(lock, "cooking", "pot"),
        pytest.raises(ValueError, match=words),
        only_process(lock, "cooking", "pot"),
    ):
        pass
    with only_process(lock, "cooking", "pot"):
        assert lock.exists()
    assert not lock.exists()


def test_the_lock_ends_with_an_error(tmp_path):
    lock = tmp_path / "the.lock"
    with pytest.raises(KeyError), only_process(lock, "cooking", "pot"):
        raise KeyError
    with only_process(lock, "cooking", "pot"):
        assert lock.exists()


def test_the_file_of_a_process_that_was_killed_holds_nobody_back(tmp_path):
    lock = tmp_path / "the.lock"
    lock.touch()
    with only_process(lock, "cooking", "pot"):
        assert lock.exists()
    assert not lock.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)), NotImplementedError("no flock")])
def test_where_there_are_no_locks_that_is_said_and_the_work_is_done(tmp_path, error, monkeypatch, caplog):
    def refuse(*given, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    done = []
    with only_process(tmp_path / "the.lock", "cooking", "pot"):
        done.append(1)
    assert done and f"{tmp_path}: nothing keeps other processes out" in caplog.text
