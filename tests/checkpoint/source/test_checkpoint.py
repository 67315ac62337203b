"""Opening a checkpoint: what its headers say, what is refused, and how single tensors are read."""

import json
import mmap
import multiprocessing
import os
import pickle
import shutil

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import load, same_tensors

from qsvft.checkpoint.source.checkpoint import open_checkpoint
from qsvft.storage import json_files

INDEX = "model.safetensors.index.json"
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one file with some odd tensors."""
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {
            "a": torch.randn(7, 3),
            "b": torch.randn(5).bfloat16(),
            "scalar": torch.tensor(3, dtype=torch.int64),
            "none": torch.zeros(0, 4, dtype=torch.float16),
            "eight": torch.randn(3, 2).to(torch.float8_e4m3fn),
            "odd": torch.tensor([True, False, True]),
        },
        tmp_path / "model.safetensors",
    )
    return tmp_path


@pytest.fixture
def sharded(tmp_path, llama):
    """The small Llama in several shards."""
    folder = tmp_path / "sharded"
    load(llama).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def everything(checkpoint):
    return {key: checkpoint.read(key) for key in checkpoint.entries}


def write(folder, header, data=b"", length=None):
    """A safetensors file by hand: ``header`` is JSON's text or what becomes it."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_tensors_are_those_that_safetensors_reads(folder):
    checkpoint = open_checkpoint(folder)
    expected = load_file(folder / "model.safetensors")
    assert same_tensors(everything(checkpoint), expected)
    assert {key: (entry.dtype, entry.shape) for key, entry in checkpoint.entries.items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in expected.items()
    }


def test_tensors_of_all_shards_are_there(sharded):
    expected = {}
    for path in sharded.glob("model-*.safetensors"):
        expected |= load_file(path)
    checkpoint = open_checkpoint(sharded)
    assert same_tensors(everything(checkpoint), expected)
    assert set(checkpoint.shards) == {path.name for path in sharded.glob("model-*.safetensors")}


def test_rows_are_those_of_the_tensor(folder):
    checkpoint = open_checkpoint(folder)
    whole = checkpoint.read("a")
    assert torch.equal(checkpoint.read_rows("a", 2, 5), whole[2:5])
    assert torch.equal(checkpoint.read_rows("a", 6, 99), whole[6:])
    assert checkpoint.read_rows("none", 0, 5).shape == (0, 4)


def test_data_may_begin_anywhere(folder):
    values = torch.randn(2)
    header = json.dumps({"a": ONE})
    for pad in range(4):
        write(folder, header + " " * pad, values.numpy().tobytes())
        assert torch.equal(open_checkpoint(folder).read("a"), values)


def test_one_file_beside_its_config_is_a_checkpoint(folder, sharded):
    assert "a" in open_checkpoint(str(folder / "model.safetensors")).entries
    shard = min(sharded.glob("model-*.safetensors"))
    assert open_checkpoint(shard).entries.keys() == load_file(shard).keys()


def test_a_single_file_is_taken_before_an_index(sharded):
    save_file({"only": torch.ones(1)}, sharded / "model.safetensors")
    assert list(open_checkpoint(sharded).entries) == ["only"]


def test_the_config_may_name_the_file(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "config.json").write_text('{"transformers_weights": "weights.safetensors"}')
    assert "a" in open_checkpoint(folder).entries


def test_a_relative_path_holds_when_the_working_directory_changes(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(folder.parent)
    for source in (folder.name, f"{folder.name}/model.safetensors"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.name == source
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path_factory.mktemp("elsewhere"))
            assert checkpoint.read("a").shape == (7, 3)


def test_a_file_system_that_cannot_map_is_read(folder, monkeypatch):
    expected = everything(open_checkpoint(folder))

    def refuse(*args, **options):
        raise OSError("no such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert same_tensors(everything(open_checkpoint(folder)), expected)


def test_writing_to_what_was_read_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    checkpoint = open_checkpoint(folder)
    tensor = checkpoint.read("a")
    tensor.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.count_nonzero(checkpoint.read("a")) > 0


def test_reading_a_tensor_loads_no_other(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    size = 2**24
    save_file({f"t{i}": torch.full((size // 4,), float(i)) for i in range(8)}, tmp_path / "model.safetensors")
    checkpoint, process = open_checkpoint(tmp_path), psutil.Process()
    before = process.memory_info().rss
    for i in range(8):
        tensor = checkpoint.read(f"t{i}")
        assert tensor.min() == tensor.max() == i
        grown = process.memory_info().rss - before
        assert grown < 2 * size, f"reading one tensor of {size} bytes after {i} others held {grown}"
        del tensor


def _read(checkpoint, key):
    return checkpoint.read(key).sum().item()


def test_another_process_can_read(folder):
    checkpoint = open_checkpoint(folder)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (checkpoint, "a")) == checkpoint.read("a").sum().item()
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


def test_the_fingerprint_is_json_and_tells_checkpoints_apart(sharded, folder, llama):
    first = open_checkpoint(sharded).fingerprint()
    assert json.loads(json.dumps(first)) == first == open_checkpoint(sharded).fingerprint()
    assert open_checkpoint(llama).fingerprint() != first
    before = open_checkpoint(folder).fingerprint()
    (folder / "config.json").write_text('{"changed": true}')
    assert open_checkpoint(folder).fingerprint() != before


def test_the_fingerprint_holds_each_header(folder):
    write(folder, {"a": ONE}, bytes(8))
    stamp = os.stat(folder / "model.safetensors")
    first = open_checkpoint(folder).fingerprint()
    write(folder, {"b": ONE}, bytes(8))
    os.utime(folder / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = open_checkpoint(folder).fingerprint()
    assert first["files"]["model.safetensors"]["bytes"] == second["files"]["model.safetensors"]["bytes"]
    assert first != second


@pytest.mark.parametrize("what", ["shrunk", "touched", "gone"])
def test_a_file_that_changed_is_not_read(folder, what):
    checkpoint = open_checkpoint(folder)
    checkpoint.check_unchanged()
    path = folder / "model.safetensors"
    if what == "shrunk":
        os.truncate(path, 100)
    elif what == "touched":
        os.utime(path, ns=(0, 1))
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: (changed|gone) since the checkpoint was opened"):
        checkpoint.check_unchanged()
    with pytest.raises(ValueError, match=r"model\.safetensors: (changed|gone) since the checkpoint was opened"):
        checkpoint.read("a")


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"nowhere: found no such file or directory, and it is no model's id"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found an empty name"):
        open_checkpoint("")


def test_a_file_of_another_kind_is_refused(folder):
    with pytest.raises(ValueError, match=r"config\.json: found something that does not end in \.safetensors"):
        open_checkpoint(folder / "config.json")


def test_no_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: found no such file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "null", '{"a": 1, "a": 2}', "[" * 100_000, b"\xff\xfe"])
def test_a_config_that_is_no_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json: found .* expected an object"):
        open_checkpoint(folder)


def test_pickles_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, expected model\.safetensors .*save_pretrained"):
        open_checkpoint(folder)


def test_a_directory_without_weights_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"found other\.safetensors, .*Name the \.safetensors file itself"):
        open_checkpoint(folder)
    (folder / "other.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="found no weights"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "x.bin", 3])
def test_a_config_that_names_a_file_elsewhere_is_refused(folder, name):
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(ValueError, match=r"config\.json: found transformers_weights"):
        open_checkpoint(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: found something that is no file"):
        open_checkpoint(folder)


def test_large_json_is_not_read(sharded, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 1000)
    (sharded / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{INDEX}: found \d+ bytes, expected at most 1000"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "no"])
def test_an_index_without_a_weight_map_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=rf"{INDEX}: found"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "name",
    ["../{}", "/{}", "sub/{}", "sub\\{}", "C:{}", "..", "", "\0{}", "x.bin", None, 7, ["{}"]],
)
def test_an_index_cannot_name_a_file_elsewhere(sharded, name):
    shard = min(sharded.glob("model-*.safetensors")).name
    for place in ("sub", ".."):
        (sharded / place).mkdir(exist_ok=True)
        shutil.copy(sharded / shard, sharded / place / shard)
    named = name.format(shard) if isinstance(name, str) else name
    change_index(sharded, lambda files: files.update(dict.fromkeys([k for k in files if files[k] == shard], named)))
    with pytest.raises(ValueError, match=rf"{INDEX}: found .* expected the plain name"):
        open_checkpoint(sharded)


def test_a_file_may_be_a_link_to_elsewhere(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("blobs")
    before = everything(open_checkpoint(sharded))
    for path in sharded.glob("model-*.safetensors"):
        blob = elsewhere / path.name[6:11]
        shutil.move(path, blob)
        path.symlink_to(blob)
    assert same_tensors(everything(open_checkpoint(sharded)), before)


def test_a_missing_shard_is_named(sharded):
    shard = max(sharded.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name}: found no such file"):
        open_checkpoint(sharded)


def test_a_key_that_its_shard_lacks_is_named(sharded):
    shard = max(sharded.glob("model-*.safetensors")).name
    change_index(sharded, lambda files: files.update(extra=shard))
    with pytest.raises(ValueError, match=rf"{shard}: found no 'extra', which {INDEX} places in it"):
        open_checkpoint(sharded)


def test_a_key_that_the_index_lacks_is_named(sharded):
    change_index(sharded, lambda files: files.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=rf"found 'model\.norm\.weight', which {INDEX} does not place in it"):
        open_checkpoint(sharded)


def test_a_key_in_two_shards_is_refused(sharded):
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    key = min(load_file(first))
    save_file(load_file(last) | {key: torch.ones(2)}, last)
    with pytest.raises(ValueError, match=rf"{last.name}: found '{key}', which {first.name} has as well"):
        open_checkpoint(sharded)


def test_a_name_given_twice_in_an_index_is_refused(sharded):
    text = (sharded / INDEX).read_text()
    shard = min(sharded.glob("model-*.safetensors")).name
    (sharded / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"lm_head.weight": "{shard}",', 1))
    with pytest.raises(ValueError, match=rf"{INDEX}: .*'lm_head.weight' is given twice"):
        open_checkpoint(sharded)
