"""prepare_checkpoint: the same as in memory, whole or not at all, and going on after any interruption."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import load, same_tensors, save_llama
from stored_models import factors_in
from transformers import GPT2Config, GPT2LMHeadModel, Llama4ForCausalLM, Llama4TextConfig

import qsvft
from qsvft.checkpoint.making import directory as targets
from qsvft.checkpoint.making import job as jobs
from qsvft.checkpoint.making.streaming import PreparationInterrupted
from qsvft.storage.weights import dense_weight

HALTING = """
import sys
from qsvft.checkpoint.making import directory
from qsvft.cli.main import app

write, begun = directory.write_tensors, []

def halting(tensors, path, metadata):
    write(tensors, path, metadata)
    begun.append(path)
    if len(begun) == 3:
        path.write_bytes(path.read_bytes()[:100])
        print("half a part is written", flush=True)
        sys.stdin.read()  # until the kill

directory.write_tensors = halting
app()
"""


def tensors_in(folder):
    """Every tensor of a prepared directory, by the index."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(weight_map.values())):
        found |= load_file(folder / file)
    assert found.keys() == weight_map.keys()
    return found


def in_memory(model):
    """What a prepared directory would hold of a model that was prepared in memory."""
    from qsvft.checkpoint.prepared.model_state import state_of

    return {name: value.detach().cpu() for name, value in state_of(model).items()}


def prepared(source, target, **options):
    return qsvft.prepare_checkpoint(source, target, progress=False, **options)


@pytest.fixture(scope="module")
def conv(tmp_path_factory):
    """A GPT-2: Conv1D, biases and a head that is tied to the embedding."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4)).save_pretrained(folder)
    return folder


@pytest.mark.anywhere
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sides": "one"},
        {"bits": 8},
        {"factor_bits": 4, "rank": 16, "sides": "one"},
        {"factor_bits": 8, "sides": "one"},
        {"sides": "both", "rank_pattern": {"k_proj": 12}},
        {"sides": "both", "residual": True, "rank": 24, "factor_bits": 4},
        {"target_modules": ["q_proj", "k_proj", "down_proj"], "rank": 12, "sides": "one"},
        {"decomposition": "randomized", "rank": 12},
        {"decomposition": "randomized", "rank": 12, "sides": "one"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_streamed_and_in_memory_give_the_same_bits(llama, tmp_path, options):
    folder = prepared(llama, tmp_path / "prepared", **options)
    in_dtype = getattr(torch, options.pop("dtype", "float32"))
    model = qsvft.prepare(load(llama, in_dtype), progress=False, **options)
    assert same_tensors(tensors_in(folder), in_memory(model.get_base_model()))


@pytest.mark.anywhere
def test_the_base_may_stay_as_it_is(llama, tmp_path):
    folder = prepared(llama, tmp_path / "prepared", bits=16)
    weights = {name: value for name, value in tensors_in(folder).items() if not name.startswith("qsvft.")}
    assert same_tensors(
        weights, {name: value.clone() for name, value in load(llama, torch.float32).state_dict().items()}
    )


@pytest.mark.anywhere
@pytest.mark.parametrize("bits", [4, 8])
def test_conv1d_and_tied_heads(conv, tmp_path, bits):
    folder = prepared(conv, tmp_path / "prepared", bits=bits)
    model = qsvft.prepare(load(conv, torch.float32), bits, progress=False)
    expected = in_memory(model.get_base_model())
    assert "lm_head.weight" not in expected  # tied: it is the embedding, and stored once
    assert same_tensors(tensors_in(folder), expected)


def test_what_makes_it_a_model(llama, tmp_path):
    folder = prepared(llama, tmp_path / "prepared", rank=16)
    config = json.loads((folder / "config.json").read_text())
    record = config["quantization_config"]
    assert record["quant_method"] == "qsvft"
    assert record["bits"] == 4
    assert record["adapter"]["rank"] == 16
    assert "load_in_4bit" not in record  # transformers would give the directory to bitsandbytes' quantiser
    assert (folder / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_each_file_says_which_part_of_which_plan_it_is(llama, tmp_path):
    folder = prepared(llama, tmp_path / "prepared")
    plans, names = set(), set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            plans.add(handle.metadata()["qsvft_plan"])
            names.add(handle.metadata()["qsvft_unit"])
    assert len(plans) == 1
    assert "model.layers.0.self_attn.q_proj" in names


def test_the_bytes_are_known_before(llama, tmp_path):
    job = jobs.open_job(llama, 4, None, {"factor_bits": 4})
    folder = prepared(llama, tmp_path / "prepared", factor_bits=4)
    for number, unit in enumerate(job.units):
        record = job.target(folder)._record(number, unit.name)
        assert abs(record.nbytes - unit.nbytes) <= 512


def test_the_bar_shows_the_part_done_and_the_time_left(llama, tmp_path, monkeypatch, capfd):
    interrupted(llama, tmp_path / "prepared", monkeypatch, after=3)
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    qsvft.prepare_checkpoint(llama, tmp_path / "prepared")
    shown = capfd.readouterr().err
    assert re.search(r"preparing: +\d+%\|.*3/15 \[\d\d:\d\d<", shown)  # what was finished before is not done again
    assert re.search(r"preparing: 100%\|.*15/15 \[\d\d:\d\d<00:00\]", shown)


class Stops:
    """Lets a number of units pass and then raises."""

    def __init__(self, monkeypatch, error, after):
        self.done, self.after, self.error = [], after, error
        self._do = jobs.Job.do
        monkeypatch.setattr(jobs.Job, "do", lambda *args: self.do(*args))

    def do(self, job, number, *args):
        if len(self.done) == self.after:
            raise self.error
        self.done.append(number)
        return self._do(job, number, *args)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """A llama prepared without an interruption."""
    return prepared(llama, tmp_path_factory.mktemp("whole") / "prepared")


def contents(path):
    """What a file says; the header of a safetensors file is in no fixed order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="pt") as handle:
        return handle.metadata(), {name: value.tolist() for name, value in load_file(path).items()}


def same_files(left, right):
    names = sorted(path.name for path in left.iterdir())
    return names == sorted(path.name for path in right.iterdir()) and all(
        contents(left / name) == contents(right / name) for name in names
    )


@pytest.mark.parametrize("after", range(16))
def test_interrupted_anywhere_it_goes_on_with_what_is_finished(llama, whole, tmp_path, monkeypatch, after):
    total = len(list(whole.glob("*.safetensors")))
    with monkeypatch.context() as patch:
        Stops(patch, KeyboardInterrupt(), after)
        if after < total:
            with pytest.raises(PreparationInterrupted, match=f"{after} of {total} parts .*run the same again to go on"):
                prepared(llama, tmp_path / "prepared")
            assert not (tmp_path / "prepared" / "model.safetensors.index.json").exists()
        else:
            prepared(llama, tmp_path / "prepared")
    if after < total:
        rest = Stops(monkeypatch, RuntimeError("one too many"), total - after)
        prepared(llama, tmp_path / "prepared")
        assert len(rest.done) == total - after
    assert same_files(tmp_path / "prepared", whole)


def test_killed_at_once_it_goes_on(tmp_path):
    source = save_llama(tmp_path / "source", hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    target, command = tmp_path / "prepared", [sys.executable, "-c", HALTING, "prepare", str(source)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, str(target)], env=environment, text=True, **pipes) as process:
        halted = "half a part is written\n" in process.stdout
        process.send_signal(signal.SIGKILL)
        assert halted, process.stderr.read()[-2000:]
    finished = {path.name: path.stat().st_mtime_ns for path in target.glob("model-*.safetensors")}
    assert len(finished) == 2
    assert len(list((target / targets.WRITING).iterdir())) == 1
    assert not targets.is_finished(target)
    prepared(source, target)
    kept = {name for name, changed in finished.items() if (target / name).stat().st_mtime_ns == changed}
    assert kept == finished.keys()
    assert same_tensors(tensors_in(target), tensors_in(prepared(source, tmp_path / "again")))


def test_a_kill_between_the_index_and_the_clearing_up_leaves_a_finished_model(llama, whole, tmp_path):
    folder = tmp_path / "prepared"
    shutil.copytree(whole, folder)
    (folder / targets.MANIFEST).write_text("{}")
    assert prepared(llama, folder) == folder
    assert same_files(folder, whole)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "of another part", "of another plan", "begun"])
def test_only_whole_parts_of_the_same_plan_count(llama, whole, tmp_path, monkeypatch, damage):
    folder = tmp_path / "prepared"
    with monkeypatch.context() as patch:
        Stops(patch, KeyboardInterrupt(), 4)
        with pytest.raises(KeyboardInterrupt):
            prepared(llama, folder)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    if damage == "truncated":
        first.write_bytes(first.read_bytes()[:-1])
    elif damage == "garbage":
        first.write_bytes(b"x" * 100)
    elif damage == "of another part":
        shutil.copy(second, first)
    elif damage == "of another plan":
        with safe_open(first, framework="pt") as handle:
            metadata = {**handle.metadata(), "qsvft_plan": "0" * 64}
        save_file(load_file(first), first, metadata=metadata)
    else:
        (folder / targets.WRITING).mkdir()
        (folder / targets.WRITING / "model-00001-of-00015.safetensors-7").write_bytes(b"half")
        (folder / targets.WRITING / ".tmp123").write_bytes(b"half")
    prepared(llama, folder)
    assert same_files(folder, whole)


def interrupted(source, folder, monkeypatch, after=3, **options):
    with monkeypatch.context() as patch:
        Stops(patch, KeyboardInterrupt(), after)
        with pytest.raises(KeyboardInterrupt):
            prepared(source, folder, **options)
    return folder


@pytest.fixture
def changeable(llama, tmp_path):
    """A copy of the checkpoint that a test may change."""
    shutil.copytree(llama, tmp_path / "source")
    return tmp_path / "source"


def test_another_source_is_noticed(changeable, other_llama, tmp_path, monkeypatch):
    folder = interrupted(changeable, tmp_path / "prepared", monkeypatch)
    tensors = load_file(changeable / "model.safetensors")
    save_file({**tensors, "more": torch.zeros(1)}, changeable / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not the source .* files\.model\.safetensors\.bytes was \d+ and is \d+"):
        prepared(changeable, folder)


def test_other_values_in_a_file_of_the_same_shape_are_noticed(changeable, other_llama, tmp_path, monkeypatch):
    folder = interrupted(changeable, tmp_path / "prepared", monkeypatch)
    shutil.copy(other_llama / "model.safetensors", changeable / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\S* holds other values than when"):
        prepared(changeable, folder)


def test_a_copy_with_other_times_is_the_same_source(changeable, whole, tmp_path, monkeypatch):
    folder = interrupted(changeable, tmp_path / "prepared", monkeypatch)
    os.utime(changeable / "model.safetensors", (1, 1))
    assert same_files(prepared(changeable, folder), whole)


def test_a_source_that_changes_while_it_is_read_stops_the_work(changeable, tmp_path, monkeypatch):
    do = jobs.finish_unit

    def changing(*args):
        result = do(*args)
        os.utime(changeable / "model.safetensors", (1, 1))
        return result

    monkeypatch.setattr(jobs, "finish_unit", changing)
    with pytest.raises(ValueError, match=r"model\.safetensors: changed since"):
        prepared(changeable, tmp_path / "prepared")
    assert list((tmp_path / "prepared").glob("model-*")) == []


def test_other_options_are_noticed(llama, tmp_path, monkeypatch):
    folder = interrupted(llama, tmp_path / "prepared", monkeypatch, rank=8)
    with pytest.raises(ValueError, match=r"other options .* adapter\.rank was 8 and is 16"):
        prepared(llama, folder, rank=16)


def test_a_finished_target_is_not_touched(llama, whole):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    with pytest.raises(ValueError, match="a prepared model stands here already"):
        prepared(llama, whole)
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_a_directory_with_something_else_is_not_touched(llama, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(it holds 'thesis.txt'\)"):
        prepared(llama, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_target(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is no directory"):
        prepared(llama, tmp_path / "file")


@pytest.mark.parametrize("place", [".", "prepared"])
def test_nothing_is_written_in_the_source(changeable, place):
    before = sorted(path.name for path in changeable.iterdir())
    with pytest.raises(ValueError, match="lies in the source"):
        prepared(changeable, changeable / place)
    assert sorted(path.name for path in changeable.iterdir()) == before


def test_the_source_may_be_read_only(changeable, tmp_path):
    for path in changeable.iterdir():
        path.chmod(0o444)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in changeable.iterdir()}
    prepared(changeable, tmp_path / "prepared")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in changeable.iterdir()} == before


def test_a_target_that_cannot_be_written_is_refused_before_any_work(llama, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(targets.Path, "touch", refuse)  # whoever runs the tests may be allowed everything
    monkeypatch.setattr(jobs.Job, "do", lambda *args: pytest.fail("worked"))
    with pytest.raises(PermissionError, match=r"prepared: cannot be written to \(Permission denied\)"):
        prepared(llama, tmp_path / "prepared")


def test_too_little_room_is_noticed_before_any_work(llama, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    monkeypatch.setattr(jobs.Job, "do", lambda *args: pytest.fail("worked"))
    with pytest.raises(OSError, match=r"are still to be written, 0\.00 GiB are free") as caught:
        prepared(llama, tmp_path / "prepared")
    assert caught.value.errno == errno.ENOSPC


def test_a_disk_that_fills_up_leaves_whole_parts_and_says_how_to_go_on(llama, whole, tmp_path, monkeypatch):
    save, written = targets.write_tensors, []

    def filling(tensors, path, metadata):
        save(tensors, path, metadata)
        written.append(path)
        if len(written) == 4:
            path.write_bytes(path.read_bytes()[:200])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(targets, "write_tensors", filling)
        with pytest.raises(OSError, match=r"No space left on device.* 3 of 15 parts .*run the same again") as caught:
            prepared(llama, tmp_path / "prepared")
    assert caught.value.errno == errno.ENOSPC
    assert len(list((tmp_path / "prepared").glob("*.safetensors*"))) == 3
    assert same_files(prepared(llama, tmp_path / "prepared"), whole)


def test_two_at_once_do_not_write_into_one_target(llama, tmp_path):
    job = jobs.open_job(llama, 4, None, {})
    (tmp_path / "prepared").mkdir()
    with job.target(tmp_path / "prepared").locked(), pytest.raises(ValueError, match="another process is preparing"):
        prepared(llama, tmp_path / "prepared")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj", "model.embed_tokens", "model.layers.0.input_layernorm", "lm_head"]
)
def test_nan_names_its_layer_and_leaves_what_is_finished(changeable, tmp_path, name, value):
    tensors = load_file(changeable / "model.safetensors")
    tensors[f"{name}.weight"].view(-1)[7] = value
    save_file(tensors, changeable / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: its weight holds 1 NaN or Inf"):
        prepared(changeable, tmp_path / "prepared")
    assert not targets.is_finished(tmp_path / "prepared")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 4"),
        ({"workers": 0}, "workers: expected an integer of at least 1, got 0"),
        ({"rank": 65}, r"rank=65 is over the limit"),
        ({"dtype": "int8"}, "dtype: expected 'auto'"),
        ({"device": "nowhere"}, "device: expected 'cpu'"),
        ({"colour": "red"}, "unknown option 'colour'"),
        ({"residual": True, "sides": "both", "bits": 8}, "residual=True with bits=8"),
        ({"config": qsvft.QSVFTConfig(), "rank": 8}, "either config or single options"),
        ({"target_modules": ["q_projj"]}, "Did you mean 'q_proj'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(llama, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepared(llama, tmp_path / "prepared", **options)
    assert not (tmp_path / "prepared" / targets.MANIFEST).exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"sides": "one"}], ids=str)
def test_workers_give_what_one_process_gives(llama, tmp_path, options):
    found, expected = (prepared(llama, tmp_path / str(n), workers=n, **options) for n in (2, 1))
    assert same_files(found, expected)


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_same_error(changeable, tmp_path):
    tensors = load_file(changeable / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("inf")
    save_file(tensors, changeable / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: its weight holds 1 NaN or Inf"):
        prepared(changeable, tmp_path / "prepared", workers=2)


def test_factors_are_those_of_the_weight_as_held(llama, whole):
    layer = qsvft.quantize(load(llama, torch.float32), progress=False).model.layers[0].self_attn.o_proj
    basis = factors_in(whole).basis("model.layers.0.self_attn.o_proj", "V_int8", 64, 64, torch.device("cpu"))
    held = torch.linalg.vector_norm(dense_weight(layer).double() @ basis.dense(torch.float64).T, dim=0)
    assert torch.allclose(held, torch.linalg.svdvals(dense_weight(layer).double()), rtol=0.02, atol=0.02)
    dense = load(llama, torch.float32).model.layers[0].self_attn.o_proj.weight.detach().double()
    assert not torch.allclose(held, torch.linalg.svdvals(dense), rtol=0.02, atol=0.02)


def test_what_stays_dense_is_said_before_the_work_begins(tmp_path, caplog):
    torch.manual_seed(0)
    config = Llama4TextConfig(  # whose experts compute in their own way
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_local_experts=4,
    )
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "source")
    caplog.set_level("WARNING", logger="qsvft")
    prepared(tmp_path / "source", tmp_path / "prepared", rank=8)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "Llama4TextExperts" in said and "model.layers.0.feed_forward.experts.gate_up_proj" in said
