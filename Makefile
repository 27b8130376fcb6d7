# make train and make test set up .venv by themselves. ARGS is handed on: make train ARGS="--steps 50 --seed 1"

PYTHON ?= python3
CONFIG ?= configs/tiny.py
BIN := .venv/bin
# marks of tests that take more than .venv has; .ci/run gives it to them
ELSEWHERE := live or emulator or harness or browser or kernel or hopper or interpreter

.PHONY: setup train test slow lint types notebooks

setup: .venv/.ready

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moejax needs Python 3.11 or later; make PYTHON=...")'
	@echo "setting up .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

train: setup
	$(BIN)/python -m moejax train $(CONFIG) $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not ($(ELSEWHERE))" $(ARGS)

slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not ($(ELSEWHERE))" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

notebooks: .venv/.notebooks
	$(BIN)/python tools/run_notebooks.py $(ARGS)

.venv/.notebooks: .venv/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,notebooks]"
	@touch $@
