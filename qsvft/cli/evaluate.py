"""``qsvft eval ADAPTER``: the loss on rows held out, or the tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options.recipe import load_yaml
from .errors import bad_input
from .library import library


def evaluate(
    adapter: Annotated[str, typer.Argument(help="A directory with an adapter, or a hub id.")],
    dataset: Annotated[str | None, typer.Option(help="Rows: a hub id, a directory or a file.")] = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    dataset_config: Annotated[str | None, typer.Option(help="Of a data set of the hub.")] = None,
    templates: Annotated[
        str | None,
        typer.Option(help="As YAML, {prompt: ..., completion: ...}; left out, those it was trained with."),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Of lm-eval, where it is installed; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows at most, or questions of each task.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a row, at most.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 1,
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapter names.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Where the base goes: cpu, cuda, auto.")] = None,
) -> None:
    """Measure an adapter: the loss on rows that it was not trained on, or tasks of lm-eval."""
    with bad_input():
        if (dataset is None) == (not tasks):
            raise ValueError(f"found {'both' if dataset else 'neither'} --dataset and --tasks; expected one of them")
    with library(), bad_input():
        from ..loading import load
        from ..training.data import in_form, load_split
        from ..training.evaluate import evaluate
        from ..training.plan import base_tokenizer
        from ..training.tasks import check_tasks, run_tasks

        rows = None
        if dataset is None:
            check_tasks()
        else:
            rows = in_form(load_split(dataset, dataset_config, split), dataset, "sft", _templates(adapter, templates))
            rows = rows.select(range(min(limit or len(rows), len(rows))))
        model = load(adapter, base=base, device_map=device_map)
        tokenizer = base_tokenizer(adapter, otherwise=model.get_base_model().name_or_path)
        if rows is None:
            typer.echo(run_tasks(model, tokenizer, tasks or [], limit, batch_size))
        else:
            typer.echo(str(evaluate(model, tokenizer, rows, max_length, batch_size)))


def _templates(adapter: str, given: str | None) -> Any:
    recipe = Path(adapter, "recipe.yaml")
    if given is None and recipe.is_file():
        return (load_yaml(recipe.read_text(encoding="utf-8")) or {}).get("templates")
    return None if given is None else load_yaml(given)
