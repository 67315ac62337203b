"""How others judge the same texts: what is installed, and what the paper used, as functions of their checkouts."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import latex, numbers

Judge = Callable[[str, str], bool]
"""Whether a text is right by a reference."""


def harness_on_gsm8k() -> dict[str, Judge]:
    """The two ways of lm-evaluation-harness's task gsm8k, as its file says them."""
    import lm_eval
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(file.read_text(encoding="utf-8"))
    [metric] = task["metric_list"]
    options = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}

    def judge_of(step: dict[str, Any]) -> Judge:
        chosen = RegexFilter(**{key: value for key, value in step.items() if key != "function"})

        def judge(text: str, reference: str) -> bool:
            [found] = chosen.apply([[text]], [{}])
            return bool(exact_match_hf_evaluate(predictions=found, references=[reference], **options)["exact_match"])

        return judge

    return {f"lm-eval, {way['name']}": judge_of(way["filter"][0]) for way in task["filter_list"]}


def harness_on_math(text: str, reference: str) -> bool:
    """Its comparison of answers, given ours: what it reads as an answer depends on the prompt."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    found = latex.answer(text)
    return found is not None and bool(is_equiv(found, latex.reference_answer(reference)))


def math_verify_on_gsm8k(text: str, reference: str) -> bool:
    """Its reading and its comparison, the reference's number alone."""
    from math_verify import parse, verify

    return bool(verify(parse(reference.split("####")[-1]), parse(text)))


def math_verify_on_math(text: str, reference: str) -> bool:
    """Its comparison of answers, given ours as a formula."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${latex.reference_answer(reference)}$"), parse(f"${latex.answer(text)}$")))


def metamath_on_gsm8k(checkout: Path) -> Judge:
    """What MetaMath's ``eval_gsm8k.py`` says."""
    read = functions_of(checkout / "eval_gsm8k.py", "is_number", "extract_answer_number").extract_answer_number

    def judge(text: str, reference: str) -> bool:
        found = read(text)
        return found is not None and float(found) == float(numbers.reference_number(reference))

    return judge


def metamath_on_math(checkout: Path) -> Judge:
    """What MetaMath's ``eval_math.py`` says."""
    steps = ("fix_fracs", "fix_a_slash_b", "remove_right_units", "fix_sqrt", "strip_string", "is_equiv")
    util = functions_of(checkout / "util.py", *steps)
    results = functions_of(checkout / "eval_math.py", "process_results", util=util, invalid_outputs=[]).process_results
    return lambda text, reference: bool(results("", text, latex.reference_answer(reference)))


def llm_adapters(checkout: Path, name: str) -> Judge:
    """What LLM-Adapters' ``commonsense_evaluate.py`` says of a set."""
    read = functions_of(checkout / "commonsense_evaluate.py", "extract_answer").extract_answer
    theirs = SimpleNamespace(dataset={"siqa": "social_i_qa", "arc": "ARC-Easy"}.get(name, name))
    return lambda text, reference: bool(read(theirs, text) == reference)


def functions_of(path: Path, *names: str, **scope: Any) -> SimpleNamespace:
    """Functions of a script that imports what is not here; they know re, Fraction and the scope."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope |= {"re": re, "Fraction": Fraction}
    exec(compile(tree, str(path), "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})


def installed() -> tuple[dict[str, Judge], dict[str, Judge]]:
    """The installed peers, for GSM8K and for MATH.

    Raises:
        ImportError: One is not there.
    """
    for name in ("lm_eval.tasks.hendrycks_math.utils", "math_verify"):
        import_module(name)
    of_gsm8k = harness_on_gsm8k() | {"math-verify": math_verify_on_gsm8k}
    return of_gsm8k, {
        "lm-eval, given our answer": harness_on_math,
        "math-verify, given our answer": math_verify_on_math,
    }


def verdicts(judge: Judge, cases: Sequence[tuple[str, str, bool]]) -> list[bool | None]:
    """A peer's verdict on each case, None where it raises."""

    def verdict(text: str, reference: str) -> bool | None:
        try:
            return judge(text, reference)
        except Exception:
            return None

    return [verdict(text, reference) for text, reference, _ in cases]
