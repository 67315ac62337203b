"""Kill what writes, at any moment, and look at what is left: ``make kills``, or ``PYTHONPATH=tests python kill.py 50``.

Each of four kinds of work is killed (SIGKILL) so many times after a random while:

    preparing   the same call goes on, and gives the bytes that it gives without a kill
    saving      the directory holds one of the saved adapters whole, an M of one number
    merging     a directory shows nothing, or the whole merged model
    training    the last checkpoint that says it is whole loads
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from rich.progress import track
from small_models import load, randomize, save_llama

import qsvft
from qsvft.checkpoint.prepared.record import is_finished

CHILD = Path(__file__).resolve().parent / "child.py"
SMALL = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}


def killed(work: str, folder: Path, seconds: float) -> None:
    """Let a child work for so long after it is ready, at most."""
    command = [sys.executable, "-W", "ignore", str(CHILD), work, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        if child.stdout.readline() != "ready\n":
            raise RuntimeError(f"{work}: the child ended before it began:\n{child.stderr.read()}")
        time.sleep(seconds)
        child.kill()


def bytes_of(folder: Path) -> str:
    """SHA-256 of all files that a directory shows."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def prepared(folder: Path) -> None:
    """The same call again, where it had not come to its end, gives what it gives without a kill."""
    if not is_finished(folder / "prepared"):
        qsvft.prepare_checkpoint(folder / "source", folder / "prepared", progress=False)
    whole = folder / "whole"
    if not whole.exists():
        qsvft.prepare_checkpoint(folder / "source", whole, progress=False)
    assert bytes_of(folder / "prepared") == bytes_of(whole), "other bytes than without a kill"
    shutil.rmtree(folder / "prepared")


def saved(folder: Path) -> None:
    """One state, whole."""
    if not (folder / "adapter").exists():
        return
    base = qsvft.prepare(load(folder / "source"), bits=16, progress=False, rank=8).unload()
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    found = {float(one) for name, M in model.named_parameters() if "qsvft_M" in name for one in M.unique()}
    assert len(found) == 1, f"a mixture of {len(found)} states"


def merged(folder: Path) -> None:
    """Each directory that shows anything holds the whole model."""
    states = folder / "states"
    for adapter in ("first", "second"):
        if not (states / adapter).exists():
            qsvft.export(folder / adapter, states / adapter, base=str(folder / "source"), format="dense")
    shown = {path.parent for path in (folder / "merged").glob("*/[!.]*")}
    for number in (int(path.name) for path in shown):
        expected = states / ("first", "second")[number % 2]
        assert bytes_of(folder / "merged" / str(number)) == bytes_of(expected), f"merged/{number} is another model"
    shutil.rmtree(folder / "merged", ignore_errors=True)


def trained(folder: Path) -> None:
    """The last checkpoint with a trainer's state loads; that state is what the Trainer writes last."""
    whole = [path for path in (folder / "run").glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    if whole:
        base = qsvft.prepare(load(folder / "source"), bits=16, progress=False, rank=8).unload()
        PeftModel.from_pretrained(base, str(max(whole, key=lambda path: int(path.name.rpartition("-")[-1]))))
    shutil.rmtree(folder / "run", ignore_errors=True)


WORKS: dict[str, tuple[float, Callable[[Path], None]]] = {
    "preparing": (1.5, prepared),
    "saving": (1.0, saved),
    "merging": (2.0, merged),
    "training": (2.0, trained),
}
"""For how long at most each works before it is killed, in seconds, and what is looked at."""


def main() -> int:
    """Kill and look; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=50)
    parser.add_argument("--only", default="", help="one of preparing, saving, merging, training")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lost = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["QSVFT_CACHE"] = str(folder / "cache")
        save_llama(folder / "source", **SMALL)
        for seed, adapter in enumerate(("first", "second")):
            model = qsvft.prepare(load(folder / "source"), 16, progress=False, rank=8)
            randomize(model, seed=seed).save_pretrained(folder / adapter)
        for work in [options.only] if options.only else WORKS:
            longest, look = WORKS[work]
            draw = random.Random(work)
            for number in track(range(options.count), description=work):
                killed(work, folder, draw.uniform(0, longest))
                try:
                    look(folder)
                except Exception as error:  # whatever it is, something was lost
                    lost += 1
                    print(f"{work} {number}: {type(error).__name__}: {error}", flush=True)
    print(f"{options.count} kills each, {lost} lost something")
    return int(lost > 0)


if __name__ == "__main__":
    raise SystemExit(main())
