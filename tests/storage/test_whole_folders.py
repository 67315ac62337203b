"""Files that are replaced as one state: what a kill leaves at any step, two who write at once, permissions."""

import os
import threading
import time

import pytest

from qsvft.storage import whole_folders
from qsvft.storage.whole_folders import SAVED, SAVING, finish_saving, whole_folder

OLD, NEW = ({"weights": f"{age} weights", "config": f"{age} config"} for age in ("old", "new"))


class KilledError(BaseException):
    """In place of a signal: nothing of ours catches it, and no clean-up of ours runs after it."""


def write(folder, content):
    with whole_folder(folder) as staging:
        for name, text in content.items():
            (staging / "inner").mkdir(exist_ok=True)
            (staging / ("inner" if name == "config" else ".") / name).write_text(text)


def read(folder):
    finish_saving(folder)
    return {path.name: path.read_text() for path in folder.rglob("*") if path.is_file() and SAVING not in path.parts}


def steps(monkeypatch, stop_at):
    """Let each call that changes the disk be counted, and die at one of them, as a process does."""
    count = iter(range(10**6))

    def dying(real):
        def call(*args, **kwargs):
            if next(count) >= stop_at:
                raise KilledError
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(whole_folders.os, "replace", dying(os.replace))
    monkeypatch.setattr(whole_folders.shutil, "rmtree", dying(whole_folders.shutil.rmtree))
    monkeypatch.setattr(whole_folders, "_sync", dying(whole_folders._sync))
    return count


@pytest.mark.parametrize("stop_at", range(1, 9))
def test_killed_at_any_step_it_is_the_old_state_or_the_new(tmp_path, monkeypatch, stop_at):
    write(tmp_path, OLD)
    with monkeypatch.context() as patch:
        count = steps(patch, stop_at)
        with pytest.raises(KilledError):
            write(tmp_path, NEW)
        assert next(count) >= stop_at
    assert read(tmp_path) in (OLD, NEW)
    write(tmp_path, OLD)
    assert read(tmp_path) == OLD and sorted(os.listdir(tmp_path)) == ["inner", "weights"]


def test_the_steps_are_those_that_the_test_above_stops_at(tmp_path, monkeypatch):
    write(tmp_path, OLD)
    with monkeypatch.context() as patch:
        count = steps(patch, 10**6)
        write(tmp_path, NEW)
        assert next(count) == 10
    assert read(tmp_path) == NEW


def test_what_fails_leaves_the_old_state_and_nothing_else(tmp_path):
    write(tmp_path, OLD)

    def fail():
        with whole_folder(tmp_path) as staging:
            (staging / "weights").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert read(tmp_path) == OLD and sorted(os.listdir(tmp_path)) == ["inner", "weights"]


def test_of_two_at_once_one_waits_and_the_state_is_of_one(tmp_path):
    def slowly(content):
        with whole_folder(tmp_path) as staging:
            for name, text in content.items():
                (staging / name).write_text(text)
                time.sleep(0.05)

    threads = [threading.Thread(target=slowly, args=(content,)) for content in (OLD, NEW) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(tmp_path) in (OLD, NEW) and not (tmp_path / SAVED).exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_of_new_ones(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path) as staging:
            (staging / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == mode
    assert os.listdir(tmp_path) == ["weights"]
