"""Checkpoints named by their id on the hub, from a cache made by hand; no network is there."""

import hashlib
import shutil

import pytest
from small_models import load, same_tensors

from qsvft.checkpoint.source.checkpoint import open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_of(folder, cache, commit=COMMIT, refs=("main",)):
    """Lay a directory out as the hub's cache does: blobs by digest, links to them in snapshots, refs to commits."""
    root = cache / "models--someone--small"
    snapshot = root / "snapshots" / commit
    for kind in (snapshot, root / "blobs", root / "refs"):
        kind.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    for ref in refs:
        (root / "refs" / ref).write_text(commit)
    return snapshot


@pytest.mark.parametrize("size", ["50KB", "1GB"])
def test_an_id_is_the_cached_snapshot(llama, tmp_path, size):
    load(llama).save_pretrained(tmp_path / "local", max_shard_size=size)
    snapshot = cache_of(tmp_path / "local", tmp_path / "cache")
    local = open_checkpoint(tmp_path / "local")
    found = open_checkpoint("someone/small", cache_dir=tmp_path / "cache")
    assert found.name == "someone/small" and found.folder == snapshot
    assert found.entries == local.entries
    assert same_tensors({k: found.read(k) for k in found.entries}, {k: local.read(k) for k in local.entries})


def test_a_revision_is_the_one_that_is_named(llama, other_llama, tmp_path):
    cache_of(llama, tmp_path)
    other = cache_of(other_llama, tmp_path, commit="f" * 40, refs=("other",))
    assert open_checkpoint("someone/small", revision="other", cache_dir=tmp_path).folder == other
    assert open_checkpoint("someone/small", revision="f" * 40, cache_dir=str(tmp_path)).folder == other
    assert open_checkpoint("someone/small", cache_dir=tmp_path, local_files_only=True).folder.name == COMMIT


def test_a_file_that_the_cache_lacks_is_named(llama, tmp_path):
    load(llama).save_pretrained(tmp_path / "local", max_shard_size="50KB")
    snapshot = cache_of(tmp_path / "local", tmp_path / "cache")
    shard = max(snapshot.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        open_checkpoint("someone/small", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}, {"revision": "no-such"}, {"token": "hf_x"}])
def test_an_id_that_cannot_be_had_is_named_with_the_way_out(tmp_path, options):
    with pytest.raises(OSError, match=r"no-one/nothing: found no such file or directory, and the hub .*work offline"):
        open_checkpoint("no-one/nothing", cache_dir=tmp_path, **options)


def test_a_token_stays_out_of_the_message(tmp_path):
    with pytest.raises(OSError, match="no-one/nothing") as caught:
        open_checkpoint("no-one/nothing", cache_dir=tmp_path, token="hf_secret")
    assert "hf_secret" not in str(caught.value)
