"""How long an adapter of a 7B takes to become a LoRA or a dense model, and in how much memory, layer by layer.

    python benchmarks/export.py FOLDER [--layers 2 4] [--width 4096] [--rank 128] [--json FILE]

Makes Llama checkpoints of random bf16 weights in FOLDER, which differ in their number of layers alone, prepares each
and saves an adapter with random M, which is exported in processes of their own. Memory is what a process holds itself
(RssAnon of Linux), and what it held before the work began. Of two sizes the seconds that a layer more takes, times 32,
are about those of a whole model. Its memory is that of the smaller one and the whole LoRA, or, of a dense model, that
of the larger one: a file of a gibibyte and a layer, however many there are. So it is predicted, not measured, unless
--layers 32 (31 GiB of disk, half an hour).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from streaming import GIB, Memory, in_a_process, make_checkpoint, resident

FORMATS = ("lora", "dense")


def make_adapter(base: Path, folder: Path) -> None:
    """An adapter of a prepared base, with random M."""
    import qsvft

    model = qsvft.from_pretrained(base, progress=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qsvft_M" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(folder)


def export(adapter: str, target: str, base: str, form: str) -> dict[str, float]:
    import qsvft

    before, start = resident()["RssAnon"], time.perf_counter()
    with Memory() as memory:
        found = qsvft.export(adapter, target, format=form, base=base, progress=False)
    return {
        "seconds": time.perf_counter() - start,
        "before": before,
        "anonymous": memory.anonymous,
        "mapped": memory.mapped,
        "rank": found.rank or 0,
        "error": found.error,
        "of_weights": found.of_weights or 0.0,
        "written": sum(path.stat().st_size for path in Path(target).glob("*.safetensors")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    import qsvft

    rows = []
    for layers in parsed.layers:
        source, base, adapter = (parsed.folder / f"{name}-{layers}" for name in ("llama", "prepared", "adapter"))
        for path in (source, base, adapter):
            shutil.rmtree(path, ignore_errors=True)
        make_checkpoint(source, layers, parsed.width)
        qsvft.prepare_checkpoint(source, base, rank=parsed.rank)
        shutil.rmtree(source)
        make_adapter(base, adapter)
        for form in FORMATS:
            target = parsed.folder / f"{form}-{layers}"
            shutil.rmtree(target, ignore_errors=True)
            row = in_a_process(__file__, "export", str(adapter), str(target), str(base), form)
            rows.append({"format": form, "layers": layers, **row})
            shutil.rmtree(target)
    show(rows, parsed.width)
    if parsed.json:
        parsed.json.write_text(json.dumps({"rows": rows, "width": parsed.width}, indent=2))


def show(rows: list[dict[str, float]], width: int) -> None:
    table = Table(title=f"rank {rows[0]['rank']}, width {width}, {torch.get_num_threads()} threads")
    for heading in ("format", "layers", "seconds", "GiB at start", "at its peak", "mapped", "off", "of the weights"):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes = (f"{row[name] / GIB:.2f}" for name in ("before", "anonymous", "mapped"))
        errors = (f"{row[name]:.2%}" for name in ("error", "of_weights"))
        table.add_row(str(row["format"]), f"{row['layers']}", f"{row['seconds']:.1f}", *sizes, *errors)
    console = Console(width=120)
    console.print(table)
    for form in FORMATS:
        few, *_, many = [row for row in rows if row["format"] == form] * 2
        if few["layers"] != many["layers"]:
            layer = (many["seconds"] - few["seconds"]) / (many["layers"] - few["layers"])
            seconds = many["seconds"] + layer * (32 - many["layers"])
            # The LoRA grows with the layers; what one of them takes meanwhile does not.
            held = few["anonymous"] + 32 * many["written"] / many["layers"] if form == "lora" else many["anonymous"]
            console.print(f"{form}, predicted for 32 of them: {seconds:.0f} s, {held / GIB:.2f} GiB", highlight=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        print(json.dumps(export(*sys.argv[2:])))
    else:
        main()
