"""The memory gate bites: a leak makes it fail, and its report names the category."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from dense_basis import DenseBasis
from torch import Tensor

from qsvft.maths.basis import Held
from qsvft.storage.factors import StoredBasis
from qsvft.tuner.layer import QSVFTLinear

GATE = Path(__file__).parents[2] / "benchmarks" / "memory" / "gate.py"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_gate", GATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_gate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["qsvft", "qsvft:sides=one,pattern=banded"])
def case(request) -> tuple[str, int, bool, str]:
    return ("tiny", 256, False, request.param)


@pytest.fixture
def clean(gate: ModuleType, case: tuple) -> dict:
    return {gate.key(case): gate.measure(case)}


def test_the_same_code_gives_the_same_bytes(gate: ModuleType, case: tuple, clean: dict) -> None:
    lines, grew = gate.report(clean, {gate.key(case): gate.measure(case)})
    assert (lines, grew) == ([], False)


def coefficients_of_a_copy(self: StoredBasis, a: Tensor, rank: int) -> Tensor:
    return a @ (self.dense(torch.float32, rank) * 1.0).to(a.dtype).t()


def held_as_a_copy(self: StoredBasis, rank: int) -> Held:
    return DenseBasis(self.dense(torch.float32, rank) * 1.0).held(rank)


@pytest.mark.parametrize(
    ("case", "name", "leaking"),
    [
        ("qsvft", "held", held_as_a_copy),
        ("qsvft:pattern=banded", "to_coefficients", coefficients_of_a_copy),
        ("qsvft:sides=one,pattern=banded", "to_coefficients", coefficients_of_a_copy),
    ],
    indirect=["case"],
)
def test_a_factor_copy_kept_by_autograd_is_reported_under_saved_activations(
    gate, case, clean, monkeypatch, name, leaking
) -> None:
    monkeypatch.setattr(StoredBasis, name, leaking)
    lines, grew = gate.report(clean, {gate.key(case): gate.measure(case)})
    assert grew
    assert any("saved activations" in line and "+" in line for line in lines)
    assert any("MiB" in line for line in lines)


def test_an_fp32_cast_of_x_kept_by_autograd_is_reported_under_saved_activations(gate, case, clean, monkeypatch) -> None:
    original = QSVFTLinear._updated

    def leaking(self: QSVFTLinear, adapter: str, base: Tensor, a: Tensor) -> Tensor:
        wide = a.float()
        return original(self, adapter, base, (wide * wide.detach().sign().abs()).to(a.dtype))

    monkeypatch.setattr(QSVFTLinear, "_updated", leaking)
    lines, grew = gate.report(clean, {gate.key(case): gate.measure(case)})
    assert grew
    assert any("saved activations" in line for line in lines)


def test_a_growth_that_the_loss_hides_in_the_total_still_fails(gate: ModuleType, clean: dict) -> None:
    (name, result), *_ = clean.items()
    leaked = json.loads(json.dumps(result))
    leaked["phases"]["forward"] += 110 * gate.MIB
    lines, grew = gate.report(clean, {name: leaked})
    assert grew
    assert any("forward" in line and "+110.000 MiB" in line for line in lines)


def test_an_improvement_asks_to_be_written_down(gate, clean, tmp_path, monkeypatch, capsys) -> None:
    (name, result), *_ = clean.items()
    before = {**result, "peak": result["peak"] + 512}
    budgets = tmp_path / "budgets.json"
    gate.write(budgets, {"versions": gate.installed(), "budgets": {name: before}})
    monkeypatch.setattr(gate, "measure_all", lambda *_: clean)
    monkeypatch.setattr(sys, "argv", ["gate.py", "--budgets", str(budgets)])
    assert gate.main() == 1
    assert "make memory-update" in capsys.readouterr().out


def test_other_versions_are_refused_with_what_to_do(gate, tmp_path, monkeypatch, capsys) -> None:
    budgets = tmp_path / "budgets.json"
    gate.write(budgets, {"versions": {**gate.installed(), "torch": "0.0.1"}, "budgets": {}})
    monkeypatch.setattr(sys, "argv", ["gate.py", "--budgets", str(budgets)])
    assert gate.main() == 1
    out = capsys.readouterr().out
    assert "0.0.1" in out
    assert "make memory-update" in out


def test_every_case_has_a_budget(gate: ModuleType) -> None:
    held = json.loads(gate.BUDGETS.read_text())["budgets"]
    assert set(held) == {gate.key(case) for case in gate.cases()}
