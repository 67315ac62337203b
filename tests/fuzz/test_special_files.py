"""A file that is a pipe, a folder, a link to nothing, or 20 GB of zeros: as before, or refused by name, at once."""

import os
import shutil

import pytest
from doors import doors

HUGE = 20_000_000_000
UNREAD = ("README.md", "tokenizer.json", "tokenizer_config.json")


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


def _folder(path):
    path.unlink()
    path.mkdir()


def _dangling(path):
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def _huge(path):
    os.truncate(path, HUGE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return doors(tmp_path_factory.mktemp("doors"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_pipe, _folder, _dangling, _huge])
@pytest.mark.parametrize("door", ["prepared", "adapter", "checkpoint"])
def test_what_is_no_file_or_far_too_large_is_refused_by_name_without_being_read(whole, tmp_path, door, make):
    for name in sorted(path.name for path in whole[door].folder.iterdir()):
        folder = tmp_path / name
        shutil.copytree(whole[door].folder, folder)
        make(folder / name)
        if name in UNREAD or (make is _huge and door == "checkpoint" and name == "generation_config.json"):
            assert whole[door].outcome(folder) is None
            continue
        with pytest.raises((ValueError, OSError), match=name.split(".")[0]):
            whole[door].read(folder)
