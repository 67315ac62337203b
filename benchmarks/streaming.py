"""Preparing a checkpoint one matrix at a time: peak memory and time, at several sizes, and how fast the result loads.

    python benchmarks/streaming.py FOLDER [--layers 8 24] [--width 2048] [--rank K] [--factor-bits 4] [--json FILE]
    python benchmarks/streaming.py FOLDER --width 4096 --layers 32   # of Llama-2-7B: 17 GiB of disk, half an hour

Makes Llama checkpoints of random bf16 weights in FOLDER, which differ in their number of layers alone (with the
defaults 1.1 and 2.7 GiB), and prepares each in a process of its own. Memory is what the process holds itself (RssAnon
of Linux: pages mapped from files can be dropped at any time, and are shown beside it; with --workers the sum over
all processes), sampled every 30 ms. Beside it stands what was predicted: the working set of the largest unit of work.
What is asked for is a peak of at most that and 1 GiB, the same for all sizes. Of two sizes the seconds that a layer
more takes, times 32, are about those of a whole model. Then the prepared directory is loaded in another process, with a
new adapter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GIB = 2**30
SHARD_BYTES = 2**29


def make_checkpoint(folder: Path, layers: int, width: int) -> int:
    """A Llama of random weights in shards; gives its bytes."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 128, 1),
        num_key_value_heads=max(width // 128, 1),
        vocab_size=32000 if width >= 1024 else 256,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(layers)
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    total = 0

    def write() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        shard[name] = (torch.randn(shape, generator=generator) * scale).bfloat16()
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Memory:
    """The highest RssAnon and RssFile while it is open, in bytes."""

    def __enter__(self) -> Memory:
        self.anonymous = self.mapped = 0
        self._look()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.03):
            self._look()

    def _look(self) -> None:
        held = resident()
        self.anonymous = max(self.anonymous, held["RssAnon"])
        self.mapped = max(self.mapped, held["RssFile"])


def resident() -> dict[str, int]:
    """RssAnon and RssFile of this process and its workers."""
    total = {"RssAnon": 0, "RssFile": 0}
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            continue  # a worker that has just ended
        found = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
        for name in total:
            total[name] += int(found.get(name, "0").split()[0]) * 1024
    return total


def prepare(source: str, target: str, options: str, workers: str) -> dict[str, float]:
    from qsvft.checkpoint.making.job import open_job
    from qsvft.checkpoint.making.streaming import chosen_device, run_job

    before = resident()["RssAnon"]
    start = time.perf_counter()
    with Memory() as memory:
        job = open_job(source, 4, None, json.loads(options))
        run_job(job, job.target(target), int(workers), chosen_device(None), progress=True)
    return {
        "seconds": time.perf_counter() - start,
        "before": before,
        "anonymous": memory.anonymous,
        "mapped": memory.mapped,
        "working_set": max(unit.working_set for unit in job.units),
        "units": len(job.units),
    }


def load(target: str) -> dict[str, float]:
    import qsvft

    start = time.perf_counter()
    with Memory() as memory:
        model = qsvft.from_pretrained(target, progress=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "anonymous": memory.anonymous, "held": sum(qsvft.held_bytes(model).values())}


def in_a_process(script: str, *arguments: str) -> dict[str, float]:
    """Run a script's other side; its last line is JSON."""
    command = [sys.executable, "-W", "ignore", script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--factor-bits", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    form = {"sides": "one", "pattern": "banded"}
    options = {**form, "rank": parsed.rank, "factor_bits": parsed.factor_bits}
    rows = []
    for layers in parsed.layers:
        source, target = parsed.folder / f"llama-{layers}", parsed.folder / f"llama-{layers}-prepared"
        for path in (source, target):
            shutil.rmtree(path, ignore_errors=True)
        source_bytes = make_checkpoint(source, layers, parsed.width)
        words = str(source), str(target), json.dumps(options), str(parsed.workers)
        prepared = in_a_process(__file__, "prepare", *words)
        written = sum(path.stat().st_size for path in target.iterdir())
        loaded = in_a_process(__file__, "load", str(target))
        rows.append({"layers": layers, "source": source_bytes, "written": written, **prepared, "loaded": loaded})
    table = Table(title=f"width {parsed.width}, {torch.get_num_threads()} threads, {parsed.workers} workers, {options}")
    for heading in (
        "source GiB",
        "written",
        "seconds",
        "at start",
        "peak",
        "mapped",
        "working set",
        "over it",
        "loads in s",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes = [row["source"], row["written"]], [row["before"], row["anonymous"], row["mapped"], row["working_set"]]
        over = row["anonymous"] - row["working_set"]
        table.add_row(
            *(f"{size / GIB:.2f}" for size in sizes[0]),
            f"{row['seconds']:.0f}",
            *(f"{size / GIB:.2f}" for size in sizes[1]),
            f"{over / GIB:.2f}",
            f"{row['loaded']['seconds']:.1f}",
        )
    console = Console(width=140)
    console.print(table)
    if len(rows) > 1:
        few, many = rows[0], rows[-1]
        layer = (many["seconds"] - few["seconds"]) / (many["layers"] - few["layers"])
        console.print(
            f"{layer:.1f} s a layer of this width: {32 * layer / 60:.1f} minutes for 32 of them", highlight=False
        )
    if parsed.json:
        parsed.json.write_text(json.dumps({"rows": rows, "options": options, "width": parsed.width}, indent=2))


OTHER_SIDE = {"prepare": prepare, "load": load}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in OTHER_SIDE:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        print(json.dumps(OTHER_SIDE[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
