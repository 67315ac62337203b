# Two commands set everything up: `make demo` and `make test`. The environment lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Waiting CPU threads sleep instead of spinning: much faster on a busy machine.
export OMP_WAIT_POLICY := PASSIVE
# mkdocs-material's notice about a release of MkDocs that constraints.txt does not take.
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test lint types unit memory memory-update docs pictures mutants clean

demo: .venv/installed
	$(BIN)/python examples/finetune.py

test: lint types unit memory docs

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

unit: .venv/installed
	$(BIN)/pytest

memory: .venv/installed
	$(BIN)/python -W ignore benchmarks/memory/gate.py

memory-update: .venv/installed
	$(BIN)/python -W ignore benchmarks/memory/gate.py --update

docs: .venv/installed
	$(BIN)/mkdocs build --strict

pictures: .venv/installed
	$(BIN)/python -W ignore docs/pictures/data_path.py
	$(BIN)/python -W ignore docs/pictures/house.py
	$(BIN)/python -W ignore docs/option_table.py

mutants: .venv/installed
	$(BIN)/python tests/mutants.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,dev,docs]"
	touch $@

clean:
	rm -rf .venv site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
