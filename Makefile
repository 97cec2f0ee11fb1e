# make run | test | test-all | gpu | wheels | gpu-offline | lint | format | clean. Each makes .venv with what it needs first.
PYTHON ?= python3
PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
# Another version of torch gets an environment of its own, with all else as in constraints.txt but for setuptools: torch
# 2.11 takes no newer one than 81.
TORCH ?= $(PINNED)
OTHER := $(filter-out $(PINNED),$(TORCH))
RANKS ?= 2
RUN_ARGS ?=
GPU_ARGS ?=
# The Python of the machine that the wheels are for.
WHEELS_FOR ?= 3.12
# tests/conftest.py says which tests stay with one worker, and why.
WORKERS ?= 2
# What make test leaves out to be quick: tests by their marks, as pytest takes them, and of each test's list of cases
# two in three. .ci/run leaves out "full" only.
WITHOUT ?= full or slow
ONE_IN ?= 3
PYTEST_ARGS ?=

# Without bytecode every worker, rank and program of the tests compiles the same sources again: a worker for nine seconds.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv$(if $(OTHER),-torch-$(OTHER))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
WHEELS := build/wheels
SITE := build/site

.DEFAULT_GOAL := help
.PHONY: help venv run test test-all gpu wheels gpu-offline lint format clean

help:
	@echo 'make run        a small FluxPipeline on this CPU: plainly, over $(RANKS) ranks, and with blocks skipped'
	@echo 'make test       the tests without the slow ones, of like cases one in three (all: make test WITHOUT=full ONE_IN=1)'
	@echo 'make test-all   the tests and the long matrix'
	@echo '                each with TORCH=2.15.0 (say) in .venv-torch-2.15.0, with that torch instead of $(PINNED)'
	@echo 'make gpu        checks and figures on a CUDA device, ten minutes at most'
	@echo 'make wheels     what make gpu-offline needs beside torch, on a machine without a network'
	@echo 'make gpu-offline   the same as make gpu, with $$PYTHON and its torch, transformers, accelerate and the like'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     ruff, changing files'
	@echo 'make clean      removes builds, caches and output (.venv stays)'

venv: $(INSTALLED)

# torch comes first and by its exact version: any other would replace it when the rest is resolved.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "paracompile needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	sed '$(if $(OTHER),s/^torch==.*/torch==$(OTHER)/; /^setuptools==/d)' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt torch 'setuptools>=77.0.3'
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation --editable '.[test,dev]'
	@touch $@

run: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/run_flux.py --device cpu $(RUN_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not ($(WITHOUT))' --one-in $(ONE_IN) $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

gpu: $(INSTALLED)
	$(BIN)/python examples/benchmarks/gpu $(GPU_ARGS)

# The code is that of this folder; the wheel of paracompile tells torch of the backend's name.
gpu-offline:
	@test -d $(WHEELS) || { echo 'there is no $(WHEELS): make wheels, where there is a network, and copy it'; exit 1; }
	rm -rf $(SITE)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target $(SITE) $(WHEELS)/*.whl
	PYTHONPATH=$(CURDIR):$(SITE) $(PYTHON) examples/benchmarks/gpu $(GPU_ARGS)

wheels: $(INSTALLED)
	rm -rf build
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEELS) .
	$(PIP) download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_FOR) --implementation cp \
	    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest $(WHEELS) \
	    $$(grep -E '^(diffusers|torchao|importlib_metadata)==' constraints.txt)
	@du -sh $(WHEELS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist output *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
