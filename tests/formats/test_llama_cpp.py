"""GGUF is written by llama.cpp's converters: they get what they take, and what they say reaches the reader.

A script of the test's own stands in for them: it takes the arguments that theirs take, looks at what it is given as
they do, and writes a file that begins as theirs.
"""

import json

import pytest
from safetensors.torch import load_file
from small_models import randomize, same_tensors, save_llama
from typer.testing import CliRunner

import qsvft
from qsvft.cli.main import app

STAND_IN = """
import argparse, json, pathlib
from safetensors.torch import load_file
parser = argparse.ArgumentParser()
parser.add_argument("source", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"], default="f32")
if {lora}:
    parser.add_argument("--base", type=pathlib.Path)
given = parser.parse_args()
config = json.loads(((given.base if {lora} else given.source) / "config.json").read_text())
assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
assert ((given.base if {lora} else given.source) / "tokenizer.json").is_file()
if {lora}:
    assert json.loads((given.source / "adapter_config.json").read_text())["peft_type"] == "LORA"
tensors = load_file(given.source / ("adapter_model.safetensors" if {lora} else "model.safetensors"))
dtypes = sorted({{str(t.dtype) for t in tensors.values()}})
said = {{"outtype": given.outtype, "dtypes": dtypes, "names": sorted(tensors)}}
given.outfile.write_bytes(b"GGUF" + json.dumps(said).encode())
"""
SCRIPTS = {"gguf": "convert_hf_to_gguf.py", "gguf-lora": "convert_lora_to_gguf.py"}
FILES = {"gguf": "model.gguf", "gguf-lora": "lora.gguf"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = qsvft.prepare_checkpoint(save_llama(folder / "source"), folder / "base", rank=8, progress=False)
    randomize(qsvft.from_pretrained(base, progress=False)).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """Where there is no llama.cpp."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def llama_cpp(tmp_path):
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for form, name in SCRIPTS.items():
        (folder / name).write_text(STAND_IN.format(lora=form == "gguf-lora"))
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("where", ["given", "in the environment", "on the path"])
@pytest.mark.parametrize("form", SCRIPTS)
def test_the_converter_gets_what_it_takes_wherever_it_is(adapter, llama_cpp, tmp_path, form, where, monkeypatch):
    options = {"llama_cpp": llama_cpp} if where == "given" else {}
    if where != "given":
        monkeypatch.setenv("PATH" if where == "on the path" else "LLAMA_CPP", str(llama_cpp))
    found = qsvft.export(adapter, tmp_path / "out", format=form, progress=False, **options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FILES[form], "README.md"}
    said = json.loads((tmp_path / "out" / FILES[form]).read_bytes()[4:])
    dtype = "bfloat16" if form == "gguf-lora" else "float32"  # of its base
    assert said["dtypes"] == [f"torch.{dtype}"] and found.dtype == dtype
    assert said["outtype"] == {"bfloat16": "bf16", "float32": "f32"}[dtype]
    assert found.format == form and found.layers == 14
    assert (found.rank == 8) == (form == "gguf-lora")
    source = {"gguf": "dense", "gguf-lora": "lora"}[form]
    qsvft.export(adapter, tmp_path / source, format=source, progress=False)
    (weights,) = (tmp_path / source).glob("*.safetensors")
    assert said["names"] == sorted(load_file(weights))
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(line in card for line in found.said())


def test_its_dtype_is_the_one_that_is_asked_for(adapter, llama_cpp, tmp_path):
    options = {"format": "gguf", "dtype": "float16", "llama_cpp": llama_cpp, "progress": False}
    qsvft.export(adapter, tmp_path / "out", **options)
    said = json.loads((tmp_path / "out" / "model.gguf").read_bytes()[4:])
    assert (said["outtype"], said["dtypes"]) == ("f16", ["torch.float16"])


def test_of_a_smaller_rank_it_is_that_lora(adapter, llama_cpp, tmp_path):
    qsvft.export(adapter, tmp_path / "lora", rank=8, progress=False)
    found = qsvft.export(adapter, tmp_path / "out", format="gguf-lora", rank=8, llama_cpp=llama_cpp, progress=False)
    assert found.rank == 8
    with pytest.raises(ValueError, match="rank is a LoRA's, got rank=8 with format='gguf'"):
        qsvft.export(adapter, tmp_path / "other", format="gguf", rank=8, llama_cpp=llama_cpp, progress=False)


@pytest.mark.parametrize("form", SCRIPTS)
def test_where_it_is_not_the_way_to_it_is_said_before_any_work(adapter, tmp_path, form, monkeypatch):
    with pytest.raises(ValueError, match=rf"{SCRIPTS[form]}; found none on the PATH.*git clone .*--llama-cpp"):
        qsvft.export(adapter, tmp_path / "out", format=form, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ValueError, match=rf"found none in {tmp_path}"):
        qsvft.export(adapter, tmp_path / "out", format=form, progress=False)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; print('unknown architecture', file=sys.stderr); sys.exit(1)", r"exit code 1 \(unknown arch"),
        ("pass", "wrote no GGUF file"),
        ("import sys; open(sys.argv[3], 'wb').write(b'no')", "wrote no GGUF file"),
    ],
    ids=["an error", "nothing", "another file"],
)
def test_what_goes_wrong_in_it_is_said_and_nothing_is_left(adapter, llama_cpp, tmp_path, script, message):
    (llama_cpp / SCRIPTS["gguf"]).write_text(script)
    with pytest.raises(ValueError, match=message):
        qsvft.export(adapter, tmp_path / "out", format="gguf", llama_cpp=llama_cpp, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_takes_its_folder(adapter, llama_cpp, tmp_path):
    options = ["--format", "gguf-lora", "--llama-cpp", str(llama_cpp)]
    result = CliRunner().invoke(app, ["export", str(adapter), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "lora.gguf").is_file()


def test_what_is_converted_is_what_is_exported_without_it(adapter, llama_cpp, tmp_path, monkeypatch):
    """Bit for bit."""
    kept = tmp_path / "kept"
    script = f"import shutil, sys; shutil.copytree(sys.argv[1], {str(kept)!r}); open(sys.argv[3], 'wb').write(b'GGUF')"
    (llama_cpp / SCRIPTS["gguf"]).write_text(script)
    qsvft.export(adapter, tmp_path / "out", format="gguf", llama_cpp=llama_cpp, progress=False)
    qsvft.export(adapter, tmp_path / "dense", format="dense", progress=False)
    assert same_tensors(*(load_file(one / "model.safetensors") for one in (kept, tmp_path / "dense")))
