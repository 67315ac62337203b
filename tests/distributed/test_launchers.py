"""DDP, FSDP and DeepSpeed on two processes: each cell of the table of docs/many-cards.md is a test here."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch
from launches import LAUNCHERS, ROOT, SAVED, STEPS, Scene, adapter, all_of_M, losses
from needs import need

import qsvft

sys.path.insert(0, str(ROOT / "tests" / "docs"))
from pages import table_with

PAGE = "docs/many-cards.md"
SHARDED = {"FSDP1", "FSDP2", "ZeRO-3"}
LOSS_ROUNDING = 2**-8
"""Of a loss whose logits are bf16 numbers, relative: half of a step of theirs."""


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "launches"
    shared.mkdir(exist_ok=True)
    return Scene(shared)


def train(scene, launcher):
    """M moves, and of the factors nothing is sent but to whom they are split between."""
    code, output = scene.launch(launcher).resumed
    assert code == 0, output[-3000:]
    M = all_of_M(scene.launch(launcher).folder / "adapter")
    assert M.dtype == torch.float32 and float((M != 0).float().mean()) > 0.95
    sent = scene.launch(launcher).sent
    assert sum(sum(sizes) for name, sizes in sent if "reduce" in name) >= M.nbytes // 2
    if launcher not in SHARDED:
        gathered = M.nbytes if launcher.startswith("ZeRO") else 0  # each process steps a part of M
        allowed = M.nbytes + gathered + 4096  # norms, positions and the like
        assert sum(sum(sizes) for _, sizes in sent) <= allowed


def same_M_as_one_process(scene, launcher):
    """To a quarter of what rounding to bf16 changes in it: the run of the same weights in fp32 is the measure."""
    checkpoint = scene.launch(launcher).folder / f"checkpoint-{SAVED}"
    one, exact = (scene.one_process(name) / f"checkpoint-{SAVED}" for name in ("bf16", "exact"))
    assert losses(checkpoint) == pytest.approx(losses(one), rel=LOSS_ROUNDING)
    assert near(all_of_M(checkpoint), all_of_M(one), all_of_M(exact))


def checkpoint(scene, launcher):
    """It is an adapter, with the tensors that one process saves and no factor."""
    folder = scene.launch(launcher).folder / f"checkpoint-{SAVED}"
    one = scene.one_process() / f"checkpoint-{SAVED}"
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in adapter(one).items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in adapter(folder).items()} == expected
    states = [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".distcp")]
    for path in states:
        assert not [name for name in names_in(torch.load(path, weights_only=False)) if ".stored." in name], path
    loaded = qsvft.from_pretrained(scene.folder / "bf16", adapter=folder, cache_dir=scene.folder / "cache")
    found = torch.cat([p.detach().flatten() for _, p in sorted(loaded.named_parameters()) if p.requires_grad])
    assert torch.equal(found, all_of_M(folder))


def resume(scene, launcher):
    """It goes on from the last whole checkpoint, and ends with the M of one process that nothing interrupted."""
    launch = scene.launch(launcher)
    assert launch.resumed[0] == 0, launch.resumed[1][-3000:]
    assert len(losses(launch.folder / f"checkpoint-{STEPS}")) == STEPS
    one, exact = (all_of_M(scene.one_process(name) / "adapter") for name in ("bf16", "exact"))
    assert near(all_of_M(launch.folder / "adapter"), one, exact)


def near(found, one, exact):
    """Whether M is nearer to one process's than a quarter of that one's own error, both in bf16."""
    return 4 * float((found - one).norm()) < float((exact - one).norm())


def killed_rank(scene, launcher):
    """The others end, it is said who was killed and how, and a whole checkpoint is left."""
    launch = scene.launch(launcher)
    code, output = launch.killed
    assert code != 0
    assert "rank      : 1" in output and "Signal 9 (SIGKILL)" in output
    assert losses(launch.folder / f"checkpoint-{SAVED}")


CELLS = {
    "train": train,
    "same M as one process": same_M_as_one_process,
    "checkpoint": checkpoint,
    "resume": resume,
    "killed rank": killed_rank,
}


def names_in(state):
    """All keys of nested dicts."""
    if not isinstance(state, dict):
        return
    for key, value in state.items():
        yield str(key)
        yield from names_in(value)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cell_of_the_table_is_true(scene, launcher, cell):
    if launcher.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: it compiles its operators with a C++ compiler")
    if launcher == "FSDP2":
        need("accelerate", "1.15", "asks each process for its shards of an adapter where it writes a checkpoint")
    CELLS[cell](scene, launcher)


def test_the_table_has_a_cell_for_each_test_and_no_other():
    rows = table_with(PAGE, "launcher", *CELLS)
    assert [row["launcher"] for row in rows] == list(LAUNCHERS)
    assert {heading for row in rows for heading in row} == {"launcher", "file", *CELLS}
    assert {row[cell] for row in rows for cell in CELLS} == {"yes"}
    assert [row["file"] for row in rows] == [f"`examples/distributed/{name}.yaml`" for name in LAUNCHERS.values()]
