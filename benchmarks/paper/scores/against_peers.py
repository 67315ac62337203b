"""Our verdicts beside those of others, on real solutions and on the cases worked by hand.

    python -m benchmarks.paper.scores.against_peers --data DIRECTORY [--metamath CHECKOUT] [--llm-adapters CHECKOUT]

DIRECTORY holds ``gsm8k/dev.jsonl`` ({"question", "answer"}) and ``commonsense/NAME.dev.jsonl`` ({"prompt",
"completion"}). The peers are lm-evaluation-harness and math-verify, as they are installed, and of checkouts of
meta-math/MetaMath and AGI-Edgerunners/LLM-Adapters, which the paper used, the functions that read an answer. Each
real text is judged by its own reference and by that of the next row. Printed are the numbers of verdicts, and the texts
where a peer differs unless they are many.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import SCORES, peers
from .worked import WORKED, Case

LISTED = 60
"""Differences that are still listed one by one."""

SAID = {True: "right", False: "wrong", None: "unreadable"}

SOLUTIONS: dict[str, Callable[[str, str], str]] = {
    "as GSM8K's own": lambda steps, number: f"{steps}\n#### {number}",
    "as MetaMathQA's": lambda steps, number: f"{steps}\n#### {number}\nThe answer is: {number}",
    "in a sentence": lambda steps, number: f"{steps}\nThe answer is {number}.",
    "without a mark": lambda steps, number: f"{steps}\nSo it is {number}",
    "as money": lambda steps, number: f"{steps}\nThe answer is: ${int(number.replace(',', '')):,}.00.",
    "with more behind": lambda steps, number: f"{steps}\nThe answer is: {number} in 2 days",
}
"""How the solution of a row may end."""

COMPLETIONS: dict[str, Callable[[str], str]] = {
    "the name alone": lambda name: name,
    "in a sentence": lambda name: f"the correct answer is {name}",
    "as a heading": lambda name: f"{name.capitalize()}: that is it.",
}
"""How a choice may be named."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--metamath", type=Path, help="a checkout of meta-math/MetaMath")
    parser.add_argument("--llm-adapters", type=Path, help="a checkout of AGI-Edgerunners/LLM-Adapters")
    arguments = parser.parse_args()
    try:
        of_gsm8k, of_math = peers.installed()
    except ImportError as error:
        sys.exit(f"error: {error}: pip install lm_eval 'math-verify[antlr4_13_2]'")
    if arguments.metamath:
        of_gsm8k["MetaMath"] = peers.metamath_on_gsm8k(arguments.metamath)
        of_math["MetaMath"] = peers.metamath_on_math(arguments.metamath)
    others = {"gsm8k": of_gsm8k, "math": of_math}
    if arguments.llm_adapters:
        others |= {
            name: {"LLM-Adapters": peers.llm_adapters(arguments.llm_adapters, name)} for name in WORKED.keys() - others
        }
    compare(Console(), [*real(arguments.data), *(("worked by hand", *pair) for pair in WORKED.items())], others)


def real(data: Path) -> Iterator[tuple[str, str, list[Case]]]:
    """What the cases are, the name of their set, and the cases."""
    rows = [row["answer"].rpartition("\n#### ") for row in _rows(data / "gsm8k" / "dev.jsonl")]
    for form, ended in SOLUTIONS.items():
        texts = [ended(steps, number) for steps, _, number in rows]
        yield form, "gsm8k", list(judged(texts, [f"#### {number}" for _, _, number in rows]))
    for path in sorted((data / "commonsense").glob("*.dev.jsonl")):
        names = [row["completion"] for row in _rows(path)]
        title = path.name.removesuffix(".dev.jsonl")
        for form, written in COMPLETIONS.items():
            cases = list(judged([written(name) for name in names], names))
            yield f"{title}, {form}", "arc" if title.startswith("arc") else title, cases


def judged(texts: Sequence[str], references: Sequence[str]) -> Iterator[Case]:
    """Each text with its own reference, and with the next one where that is another."""
    for text, own, other in zip(texts, references, [*references[1:], references[0]], strict=True):
        yield text, own, True
        if other != own:
            yield text, other, False


def compare(
    console: Console, groups: Sequence[tuple[str, str, Sequence[Case]]], others: dict[str, dict[str, peers.Judge]]
) -> None:
    """Print how many verdicts on each group are as they must be, ours and each peer's, and where the two differ."""
    table = Table(header_style="bold")
    for heading in ("set", "texts", "by", "verdicts", "as they must be", "right to us alone", "right to it alone"):
        table.add_column(heading)
    lines: list[str] = []
    for title, name, cases in groups:
        ours = [SCORES[name].right(text, reference) for text, reference, _ in cases]
        table.add_row(name, title, "ours", str(len(cases)), _correct(ours, cases), "", "")
        for peer, judge in others.get(name, {}).items():
            theirs = peers.verdicts(judge, cases)
            found = [(case, a, b) for case, a, b in zip(cases, ours, theirs, strict=True) if a is not b]
            alone = (sum(a for _, a, _ in found), sum(b is True for *_, b in found))
            table.add_row("", "", peer, str(len(cases)), _correct(theirs, cases), *map(str, alone))
            if 0 < len(found) <= LISTED:
                lines.append(f"{name}, {title}: {peer}")
                lines += [_line(*row) for row in found]
    console.print(table)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _correct(verdicts: Sequence[bool | None], cases: Sequence[Case]) -> str:
    return str(sum(found is right for found, (_, _, right) in zip(verdicts, cases, strict=True)))


def _line(case: Case, ours: bool, theirs: bool | None) -> str:
    return f"    {_end(case[0])} for {_end(case[1])}: {SAID[ours]} to us, {SAID[theirs]} to it"


def _end(text: str) -> str:
    return repr(text if len(text) < 80 else "..." + text[-60:])


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
