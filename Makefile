# Two commands set everything up: `make demo` and `make test`. The environment lives in .venv; for another Python:
#     make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLOOR_PYTHON ?= python3.10
# Processes that run tests at the same time, each on one thread.
WORKERS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Waiting CPU threads sleep instead of spinning: much faster on a busy machine.
export OMP_WAIT_POLICY := PASSIVE
# mkdocs-material's notice about a release of MkDocs that constraints.txt does not take.
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test lint types unit elsewhere test-elsewhere memory memory-update docs bench pictures mutants peft-suite attacks fuzz kills bases test-floor clean

demo: $(VENV)/installed
	$(BIN)/python examples/finetune.py

test: lint types unit elsewhere memory docs

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

unit: $(VENV)/installed
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# As other machines would: the farthest setting here, thirteen in test-elsewhere.
elsewhere: $(VENV)/installed
	$(BIN)/python tests/elsewhere.py --short

test-elsewhere: $(VENV)/installed
	$(BIN)/python tests/elsewhere.py

memory: $(VENV)/installed
	$(BIN)/python -W ignore benchmarks/memory/gate.py

memory-update: $(VENV)/installed
	$(BIN)/python -W ignore benchmarks/memory/gate.py --update

# Times of layers and steps, their floors and how they grow: two minutes on two cores. Let nothing else run meanwhile.
bench: $(VENV)/installed
	$(BIN)/python -W ignore benchmarks/speed/run.py --short

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

pictures: $(VENV)/installed
	$(BIN)/python -W ignore docs/pictures/data_path.py
	$(BIN)/python -W ignore docs/pictures/house.py
	$(BIN)/python -W ignore docs/option_table.py

mutants: $(VENV)/installed
	$(BIN)/python tests/mutants.py

# What an enemy or a fault would do to files, and what is said of it; they are among the tests as well.
attacks: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -W ignore tests/attacks/run_attacks.py

# Ten times as many damaged files as the tests read; some twenty to forty minutes.
fuzz: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python tests/fuzz/read_damaged.py 20000

# Fifty kills each of what prepares, saves, merges and trains; some half an hour.
kills: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python tests/kills/kill.py 50

# PEFT's own tests, on adapters of ours; some five minutes.
peft-suite: $(VENV)/installed
	$(BIN)/python tests/peft_suite/run.py

# Adapters on the bases of libraries that change more than themselves where they are installed: transformers imports HQQ,
# PEFT torchao, each at its start and not silently. They get an environment of their own; a few minutes.
bases: .venv-bases/installed
	.venv-bases/bin/python -m pytest -p no:cacheprovider -W ignore::DeprecationWarning -W ignore::FutureWarning -W ignore::UserWarning tests/tuner/test_bases.py tests/storage/test_packed.py

.venv-bases/installed: pyproject.toml constraints.txt constraints-bases.txt
	$(PYTHON) -m venv .venv-bases
	.venv-bases/bin/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	.venv-bases/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	.venv-bases/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-bases.txt
	touch $@

# The suite on the lowest versions that pyproject.toml declares. What is about the sources and not about versions
# (the plan of the code, the docs) is left to `make test`.
test-floor: .venv-floor/installed
	.venv-floor/bin/python -m pytest -n $(WORKERS) --dist worksteal --ignore tests/test_house.py --ignore tests/docs --ignore tests/test_private_names.py

.venv-floor/installed: pyproject.toml constraints-floor.txt
	$(FLOOR_PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-floor.txt --editable ".[test]"
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,dev,docs]"
	touch $@

clean:
	rm -rf .venv .venv-* site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
