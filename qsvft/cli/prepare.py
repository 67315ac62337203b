"""``qsvft prepare SOURCE TARGET``: a checkpoint of any size becomes a prepared directory, one matrix at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options.adapter import OPTIONS
from .errors import bad_input, complain
from .library import library
from .options import takes_options

if TYPE_CHECKING:
    from ..checkpoint.making.job import Job

FACTORS = [one for one in OPTIONS.values() if one.of_factors]
"""What a prepared directory depends on."""


@takes_options(FACTORS)
def prepare(
    source: Annotated[str, typer.Argument(help="A directory or file of safetensors, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="The directory to make, or to go on with.")],
    bits: Annotated[int, typer.Option(help="How the base is held: 4 (NF4), 8 (int8) or 16 (as it is).")] = 4,
    dtype: Annotated[str | None, typer.Option(help="The weights' dtype before they are quantised.")] = None,
    workers: Annotated[int, typer.Option(help="Processes at once; each takes memory for a matrix.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")] = False,
    **options: Any,
) -> None:
    """Quantise and decompose a checkpoint into a directory that loads in seconds. Interrupted, it goes on."""
    chosen = {name: value for name, value in options.items() if value not in (None, [])}
    with library(), bad_input():
        from ..checkpoint.making.job import open_job
        from ..checkpoint.making.streaming import PreparationInterrupted, chosen_device, run_job

        job = open_job(source, bits, None, chosen, dtype=dtype, revision=revision)
        where = chosen_device(device)
        typer.echo(_summary(job))
        if dry_run:
            return
        try:
            run_job(job, job.target(target), workers, where, progress=True)
        except PreparationInterrupted as interrupted:
            complain(str(interrupted))
            raise typer.Exit(130) from interrupted
    typer.echo(f"prepared: {target}. Load it with qsvft.from_pretrained({str(target)!r}).")


def _summary(job: Job) -> str:
    """What will be done, in two lines."""
    decomposed = [unit.stored for unit in job.units if unit.stored is not None]
    randomized = sum(stored.form.method.randomized for stored in decomposed)
    how = f", {randomized} of them randomized" if randomized else ""
    unknown = f"; {len(job.names.unknown)} keys that the model does not know are left out" if job.names.unknown else ""
    return (
        f"{type(job.model).__name__}: {len(decomposed)} decompositions{how}{unknown}\n"
        f"{len(job.units)} files, about {sum(unit.nbytes for unit in job.units) / 2**30:.2f} GiB"
    )
