"""The comparison with others: what it counts, and what it says where the others are not installed."""

import json
import sys

import pytest
from rich.console import Console

from benchmarks.paper.scores import SCORES, against_peers, peers


@pytest.fixture
def data(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "commonsense").mkdir()
    rows = [{"question": "?", "answer": f"1 + {n} = {n + 1}\n#### {n + 1:,}"} for n in (1, 1999, 1999, 5)]
    (tmp_path / "gsm8k" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, choices in (("boolq", ("true", "false")), ("arc-easy", ("answer1", "answer3"))):
        rows = [{"prompt": "?", "completion": choice} for choice in choices]
        (tmp_path / "commonsense" / f"{name}.dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_every_real_text_is_right_by_its_own_reference_and_wrong_by_another(data):
    groups = list(against_peers.real(data))
    assert {name for _, name, _ in groups} == {"gsm8k", "boolq", "arc"}
    for _, name, cases in groups:
        assert {right for _, _, right in cases} == {True, False}
        assert [SCORES[name].right(text, reference) for text, reference, _ in cases] == [right for *_, right in cases]


def test_what_a_peer_says_otherwise_is_counted_and_listed(capsys):
    def peer(text, reference):
        return {"true": True, "True": False}[text]

    cases = [("true", "true", True), ("True", "true", True), ("no", "true", False)]
    against_peers.compare(Console(width=200), [("some texts", "boolq", cases)], {"boolq": {"a peer": peer}})
    said = capsys.readouterr().out
    [row] = [line.split("│")[3:-1] for line in said.splitlines() if "a peer" in line and "│" in line]
    assert [cell.strip() for cell in row] == ["a peer", "3", "1", "1", "0"]
    assert "'True' for 'true': right to us, wrong to it" in said
    assert "'no' for 'true': wrong to us, unreadable to it" in said


def test_functions_of_a_script_run_without_what_it_imports(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import what_is_not_here\n\ndef once(text):\n    return re.findall('a', text)\n\ndef other():\n    pass\n"
    )
    found = peers.functions_of(script, "once")
    assert found.once("banana") == ["a"] * 3 and not hasattr(found, "other")


def test_without_the_peers_it_ends_with_what_to_install(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["against_peers", "--data", str(data)])
    with pytest.raises(SystemExit, match=r"^error: .*lm_eval.*: pip install lm_eval 'math-verify\[antlr4_13_2\]'$"):
        against_peers.main()
