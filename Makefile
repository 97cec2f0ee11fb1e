# make run | test | test-all | lint | format | clean. Each makes .venv with what it needs first.
PYTHON ?= python3
RANKS ?= 2
RUN_ARGS ?=
# Tests of one file share what was captured and compiled, so a file stays with one worker.
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv run test test-all lint format clean

help:
	@echo 'make run        a small FluxPipeline on this CPU: plainly, over $(RANKS) ranks, and with blocks skipped'
	@echo 'make test       the tests'
	@echo 'make test-all   the tests and the long matrix'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     ruff, changing files'
	@echo 'make clean      removes builds, caches and output (.venv stays)'

venv: $(INSTALLED)

# torch comes first and by its exact version: any other would replace it when the rest is resolved.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "paracompile needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,dev]'
	@touch $@

run: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/run_flux.py --device cpu $(RUN_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not full' $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist output *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
