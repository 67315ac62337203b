"""A prepared directory is what was written, or it is refused by the name of the file, field or tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import load as small_load
from small_models import save_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qsvft
from qsvft.checkpoint.prepared.check import SMALL_BYTES, open_prepared
from qsvft.cli.main import app

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.self_attn.o_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
NORM = "model.layers.0.input_layernorm.weight"


def prepared(source, target, **options):
    return qsvft.prepare_checkpoint(source, target, progress=False, **{"dtype": "bfloat16", **options})


@pytest.fixture(scope="module")
def streamed(llama, tmp_path_factory):
    return prepared(llama, tmp_path_factory.mktemp("streamed") / "prepared")


@pytest.fixture(scope="module")
def saved(streamed, tmp_path_factory):
    """The same as transformers saves it, in several files."""
    folder = tmp_path_factory.mktemp("saved") / "prepared"
    AutoModelForCausalLM.from_pretrained(streamed).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(params=["streamed", "saved"])
def folder(request, tmp_path):
    """A copy of either, to be damaged."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "prepared")


@pytest.fixture
def before(streamed, tmp_path):
    """A directory from before digests."""
    folder = shutil.copytree(streamed, tmp_path / "before")
    for file in folder.glob("*.safetensors"):
        rewritten(file, lambda header, tensors: header.pop("__metadata__"))
    edited(folder / INDEX, lambda index: index.update(metadata={"total_size": index["metadata"]["total_size"]}))
    return folder


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def split(path):
    """A file's header, and the bytes of each tensor."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return header, {name: data[slice(*places[name])] for name in sorted(places, key=lambda name: places[name])}


def rewritten(path, change):
    """Change header or bytes of a file, which stays a whole one: only offsets follow."""
    header, tensors = split(path)
    change(header, tensors)
    position = 0
    for name, content in tensors.items():
        header[name]["data_offsets"] = [position, position + len(content)]
        position += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))


def file_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def without(folder, name):
    """Take a tensor out of its file and out of the index."""
    rewritten(file_of(folder, name), lambda header, tensors: (header.pop(name), tensors.pop(name)))
    edited(folder / INDEX, lambda index: index["weight_map"].pop(name))


def state_with(folder, **fields):
    """Change what a quantised weight's state says."""

    def change(header, tensors):
        tensors[STATE] = json.dumps({**json.loads(tensors[STATE]), **fields}).encode()
        header[STATE]["shape"] = [len(tensors[STATE])]

    rewritten(file_of(folder, STATE), change)


def relabelled(folder, name, **fields):
    rewritten(file_of(folder, name), lambda header, tensors: header[name].update(fields))


def flipped(folder, name):
    """Change one bit of a tensor."""

    def change(header, tensors):
        tensors[name] = bytes([tensors[name][0] ^ 1]) + tensors[name][1:]

    rewritten(file_of(folder, name), change)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_what_was_written_is_whole(folder, before):
    for place in (folder, before):
        held = open_prepared(place)
        held.check(values=True)
        assert bool(held.records) is (place is folder)
        load(place)


PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("old", [False, True])
def test_a_part_that_is_not_there_is_refused(folder, before, part, old):
    place, name = before if old else folder, f"{LAYER}.weight.{part}"
    without(place, name)
    with pytest.raises(ValueError, match=rf"prepared|before.*found no .*{part}|digest"):
        load(place)


@pytest.mark.parametrize("field", ["quant_type", "blocksize", "nested_blocksize", "nested_dtype"])
@pytest.mark.parametrize("value", ["fp4", 128, None])
def test_a_state_that_the_format_does_not_have_is_refused(before, field, value):
    state_with(before, **{field: value})
    with pytest.raises(ValueError, match=rf"safetensors: found {field} = {value!r} of {LAYER}\.weight; expected"):
        load(before)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), "0.5", None])
def test_an_offset_that_is_no_number_is_refused(before, offset):
    state_with(before, nested_offset=offset)
    with pytest.raises(ValueError, match="found nested_offset = "):
        load(before)


@pytest.mark.parametrize("shape", [[64, 128], [64], [0, 64], ["64", 64], None, [32, 128]])
def test_a_shape_that_is_another_is_refused(before, shape):
    state_with(before, shape=shape)
    with pytest.raises(ValueError, match=r"o_proj.*(expected two whole numbers|needs|has by config\.json)"):
        load(before)


@pytest.mark.parametrize(
    "fields", [{"nested_offset": 0.25}, {"quant_type": "fp4"}, {"dtype": "float16"}, {"blocksize": 128}], ids=str
)
def test_a_state_is_compared_with_what_was_written(folder, fields):
    state_with(folder, **fields)
    with pytest.raises(ValueError, match=r"\.safetensors: found .*quant_state"):
        load(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    other = next(file for file in sorted(folder.glob("*.safetensors")) if file != file_of(folder, NORM))
    header, tensors = split(file_of(folder, NORM))
    rewritten(other, lambda into, content: (into.update({NORM: header[NORM]}), content.update({NORM: tensors[NORM]})))
    with pytest.raises(ValueError, match=rf"found '{NORM}', which .* [Ee]xpected"):
        load(folder)


@pytest.mark.parametrize(("name", "fields"), [(NORM, {"dtype": "F16"}), (f"{LAYER}.weight", {"shape": [1, 2048]})])
def test_a_tensor_under_another_label_is_refused(folder, name, fields):
    relabelled(folder, name, **fields)
    with pytest.raises(ValueError, match=rf"found '{name}' as .*; expected .* as it was written"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(rms_norm_eps=1e-2),
        lambda config: config.update(hidden_act="gelu"),
        lambda config: config.update(num_attention_heads=8),
        lambda config: config.update(dtype="float16"),
        lambda config: config["quantization_config"].update(compute_dtype="float16"),
        lambda config: config["quantization_config"]["adapter"].update(rank=8),
        lambda config: config["quantization_config"].update(skip_modules=["lm_head", LAYER]),
    ],
)
def test_a_config_that_was_changed_is_refused(folder, change):
    edited(folder / "config.json", change)
    with pytest.raises(ValueError, match=r"config\.json: found another config than the directory was written with"):
        load(folder)


def test_no_model_is_built_of_a_config_that_was_changed(folder, monkeypatch):
    edited(folder / "config.json", lambda config: config.update(num_hidden_layers=10**6))
    monkeypatch.setattr("qsvft.loading.load_base", lambda *args, **options: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"config\.json: found another config than"):
        qsvft.from_pretrained(folder, progress=False)


def test_what_no_result_depends_on_may_change(folder):
    edited(folder / "config.json", lambda config: config.update(use_cache=False, transformers_version="5.99.0"))
    load(folder)


def test_each_value_is_compared_when_asked_for_and_small_ones_always(folder):
    names = list(open_prepared(folder).entries)
    assert len(names) > 100
    for name in names:
        file = file_of(folder, name)
        whole = file.read_bytes()
        flipped(folder, name)
        held = open_prepared(folder)
        with pytest.raises(ValueError, match=r"\.safetensors: found other values in") as refused:
            held.check(values=True)
        assert repr(name) in str(refused.value)
        if held.entries[name].nbytes <= SMALL_BYTES:
            with pytest.raises(ValueError, match="found other values in"):
                held.check()
        file.write_bytes(whole)


def test_from_pretrained_compares_when_asked(streamed, tmp_path, monkeypatch):
    folder = shutil.copytree(streamed, tmp_path / "prepared")
    monkeypatch.setattr("qsvft.checkpoint.prepared.check.SMALL_BYTES", 0)
    flipped(folder, f"{LAYER}.weight")
    qsvft.from_pretrained(folder, progress=False)
    with pytest.raises(ValueError, match=rf"found other values in '{LAYER}\.weight'"):
        qsvft.from_pretrained(folder, verify=True, progress=False)


def test_factors_of_a_damaged_directory_are_not_used(llama, folder):
    relabelled(folder, f"qsvft.{LAYER.replace('.', '/')}.V_int8.scales", dtype="F16")
    with pytest.raises(ValueError, match=r"V_int8\.scales' as F16 .*; expected BF16"):
        qsvft.use_factors(qsvft.quantize(small_load(llama), progress=False), folder)


def test_a_file_of_another_preparation_is_refused(llama, streamed, tmp_path):
    folder = shutil.copytree(streamed, tmp_path / "prepared")
    other = prepared(save_llama(tmp_path / "other", seed=1), tmp_path / "other-prepared")
    shutil.copy(file_of(other, f"{LAYER}.weight"), file_of(folder, f"{LAYER}.weight"))
    with pytest.raises(
        ValueError, match=r"found .* noted otherwise than in another file; expected files of one directory"
    ):
        load(folder)


def test_records_that_contradict_each_other_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "prepared")

    def change(header, tensors):
        records = json.loads(header["__metadata__"]["qsvft_tensors"])
        records[NORM][2] = "0" * 64
        header["__metadata__"]["qsvft_tensors"] = json.dumps(records)

    rewritten(sorted(folder.glob("*.safetensors"))[0], change)
    with pytest.raises(ValueError, match=rf"'{NORM}' noted otherwise than in another file"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": [1]}', '{"a": ["F32", 3, "x"]}', "[" * 100_000])
def test_records_that_are_none_are_refused(streamed, tmp_path, text):
    folder = shutil.copytree(streamed, tmp_path / "prepared")
    file = file_of(folder, NORM)
    rewritten(file, lambda header, tensors: header["__metadata__"].update(qsvft_tensors=text))
    with pytest.raises(ValueError, match=rf"{file.name}: found no records of tensors"):
        load(folder)


def test_files_that_another_writer_wrote_anew_are_the_same(streamed, tmp_path):
    folder = shutil.copytree(streamed, tmp_path / "prepared")
    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), file, {"format": "pt"})
    open_prepared(folder).check(values=True)
    load(folder)
    flipped(folder, NORM)
    with pytest.raises(ValueError, match="found other values in"):
        load(folder)


def test_tied_weights_are_written_once(tmp_path):
    source = save_llama(tmp_path / "llama", tie_word_embeddings=True)
    folder = prepared(source, tmp_path / "prepared")
    load(folder).save_pretrained(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        held = open_prepared(place)
        held.check(values=True)
        assert held.records and "lm_head.weight" not in held.records


def test_int8_weights_have_their_scales(llama, tmp_path):
    folder = prepared(llama, tmp_path / "prepared", bits=8)
    relabelled(folder, f"{LAYER}.SCB", dtype="F16", shape=[128])
    rewritten(file_of(folder, f"{LAYER}.SCB"), lambda header, tensors: header.pop("__metadata__"))
    edited(folder / INDEX, lambda index: index.update(metadata={}))
    for file in folder.glob("*.safetensors"):
        rewritten(file, lambda header, tensors: header.pop("__metadata__", None))
    load(folder)  # as many bytes: without digests nothing tells
    without(folder, f"{LAYER}.weight")
    with pytest.raises(ValueError, match=rf"found no {LAYER}\.weight of int8"):
        load(folder)


@pytest.mark.parametrize("at", [0, 8, -1000, -1])
def test_a_finished_part_with_other_values_is_made_again(llama, streamed, tmp_path, monkeypatch, at, caplog):
    folder, calls = tmp_path / "prepared", []

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return finish(*args, **options)

    finish = qsvft.checkpoint.making.job.finish_unit
    monkeypatch.setattr("qsvft.checkpoint.making.job.finish_unit", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepared(llama, folder)
    done = sorted(folder.glob("*.safetensors"))
    assert len(done) == 5
    whole = done[2].read_bytes()
    at %= len(whole)
    done[2].write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    monkeypatch.setattr("qsvft.checkpoint.prepared.check.SMALL_BYTES", 0)
    prepared(llama, folder)
    assert len(calls) == len(open_prepared(streamed).shards) + 2  # the one that was stopped, and the damaged one
    assert f"{done[2].name} is made again" in caplog.text
    for file in streamed.glob("*.safetensors"):
        assert (folder / file.name).read_bytes() == file.read_bytes()


def info(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


def test_info_says_what_a_directory_is(folder, before):
    result = info(folder)
    assert result.exit_code == 0 and "LlamaForCausalLM" in result.output and "4 bits" in result.output
    assert "of 14 layers" in result.output and f"qsvft.from_pretrained('{folder}')" in result.output
    assert "yes, every value" in info(folder, "--verify").output
    assert "before there were digests" in info(before, "--verify").output


def test_info_refuses_in_one_line_what_is_not_whole(streamed, llama, tmp_path):
    folder = shutil.copytree(streamed, tmp_path / "prepared")
    flipped(folder, "model.embed_tokens.weight")
    assert info(folder).exit_code == 0 or SMALL_BYTES >= 96 * 64 * 2
    for place, words in ((folder, "found other values in"), (llama, "did not prepare"), (tmp_path / "none", "no such")):
        result = info(place, "--verify")
        assert result.exit_code == 2 and words in result.output and len(result.output.splitlines()) == 1


@pytest.mark.parametrize("classes", [[None], ["LlamaForCausalLM", 3], "LlamaForCausalLM", {"x": 1}])
def test_info_refuses_a_config_whose_classes_are_no_names(streamed, tmp_path, classes):
    folder = shutil.copytree(streamed, tmp_path / "prepared")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": classes}
    (folder / "config.json").write_text(json.dumps(config))
    result = info(folder)
    assert result.exit_code == 2 and "config.json: found architectures=" in result.output
    assert len(result.output.splitlines()) == 1


def test_info_says_what_an_adapter_is(streamed, tmp_path):
    model = qsvft.from_pretrained(streamed, progress=False)
    model.save_pretrained(tmp_path / "adapter")
    result = info(tmp_path / "adapter")
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert result.exit_code == 0, result.output
    assert f"{trained:,} numbers in 14 layers" in result.output and str(streamed) in result.output


def test_info_refuses_an_adapter_with_nan(streamed, tmp_path):
    model = qsvft.from_pretrained(streamed, progress=False)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("qsvft_M.weight"))
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, path, {"format": "pt"})
    result = info(tmp_path / "adapter")
    assert result.exit_code == 2 and "NaN or Inf" in result.output and "adapter_model.safetensors" in result.output


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("generation_config.json", {"pad_token_id": "x"}),
        ("generation_config.json", {"pad_token_id": {}}),
        ("config.json", {"architectures": [0.5]}),
        ("config.json", {"architectures": 3}),
        ("config.json", {"quantization_config": {"quant_method": "qsvft", "bits": 4, "adapter": "x"}}),
        ("config.json", {"quantization_config": {"quant_method": "qsvft", "bits": 4, "adapter": [1]}}),
        ("config.json", {"quantization_config": {"quant_method": "qsvft", "bits": 4, "skip_modules": 3}}),
    ],
    ids=str,
)
def test_values_that_make_no_model_are_refused_with_the_files_that_may_have_them(streamed, tmp_path, name, fields):
    folder = shutil.copytree(streamed, tmp_path / "folder")
    found = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**found, **fields}))
    try:
        model = qsvft.from_pretrained(folder, progress=False)
    except ValueError as error:
        assert str(folder) in str(error) and ".json" in str(error)  # noqa: PT017
    else:  # an unknown class is no class
        assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
