"""Of several processes one has a directory, as long as it lives."""

import pytest

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
