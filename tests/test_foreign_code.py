"""Code that comes with a checkpoint is not run, and an index leads nowhere else, through whatever door."""

import json
import shutil
from contextlib import nullcontext
from itertools import product

import pytest
from small_models import load, save_llama
from transformers import AutoModelForCausalLM

import qsvft

INDEX = "model.safetensors.index.json"
MODULE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "other_llama"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def adapter(llama, tmp_path):
    qsvft.prepare(load(llama), 4, rank=8, progress=False).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


DOORS = {
    "from_pretrained": lambda folder, adapter, target: qsvft.from_pretrained(folder, progress=False, rank=8),
    "prepare_checkpoint": lambda folder, adapter, target: qsvft.prepare_checkpoint(folder, target, progress=False),
    "merge": lambda folder, adapter, target: qsvft.export(adapter, target, base=folder, progress=False, format="dense"),
}


@pytest.mark.parametrize("door", [*DOORS, "profile", "recommend"])
@pytest.mark.parametrize("kind", ["llama", "other_llama"])
def test_the_code_of_a_checkpoint_is_not_run(llama, adapter, tmp_path, monkeypatch, door, kind):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked whether to run it"))
    folder, marker = tmp_path / "foreign", tmp_path / "ran"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model", "AutoModel": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": classes}))
    (folder / "foreign.py").write_text(MODULE.format(marker=str(marker)))
    doors = {**DOORS, "profile": lambda folder, *_: qsvft.profile(str(folder), ["qsvft"], seq_len=8)}
    doors["recommend"] = lambda folder, *_: qsvft.recommend(str(folder), card_gib=24)
    refused = pytest.raises(ValueError, match="config") if kind == "other_llama" else nullcontext()
    with refused:
        doors[door](folder, adapter, tmp_path / "target")
    assert not marker.exists()


# Of one that is not prepared transformers' own door asks nothing of this library.
@pytest.mark.parametrize(
    ("door", "prepared"), [*product(DOORS, [False, True]), ("AutoModel", True)], ids=lambda value: str(value)
)
def test_an_index_of_files_elsewhere_is_refused(adapter, tmp_path, door, prepared):
    """All of them there: the first as well, whose folder a loader might take for the checkpoint's."""
    folder = save_llama(tmp_path / "whole")
    if prepared:
        folder = qsvft.prepare_checkpoint(folder, tmp_path / "prepared", progress=False, dtype="bfloat16", rank=8)
    else:
        load(folder).save_pretrained(folder, max_shard_size="40KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for path in other.glob("*.safetensors"):
        path.unlink()
    index = json.loads((other / INDEX).read_text())
    index["weight_map"] = {key: f"../{folder.name}/{name}" for key, name in index["weight_map"].items()}
    (other / INDEX).write_text(json.dumps(index))
    doors = {**DOORS, "AutoModel": lambda folder, *_: AutoModelForCausalLM.from_pretrained(folder)}
    with pytest.raises(ValueError, match=rf"{INDEX}: .*expected the plain name"):
        doors[door](other, adapter, tmp_path / "target")
