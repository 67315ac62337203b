"""The tasks of lm-eval, on a model that is loaded already; see https://github.com/EleutherAI/lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_tasks() -> None:
    """Refuse where lm-eval is not installed, before anything is loaded."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks: found no lm-eval; expected it to be installed. pip install lm_eval, or give --dataset."
        )


def run_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 1,
) -> str:
    """The scores, in lm-eval's own table.

    Args:
        tasks: their names, such as "arc_easy" and "gsm8k".
        limit: questions of each, at most.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    held: Any = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)
    return str(make_table(simple_evaluate(model=held, tasks=list(tasks), limit=limit)))
