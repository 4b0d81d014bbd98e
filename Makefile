# make demo     compress a network and open the report: everything it needs is installed first
# make test     the tests; `make test-slow` the long ones, `make check` style and types
# make bench    every script in benchmarks/      make clean    remove what these targets made
#
# make PYTHON=python3.12 …        another interpreter than python3
# make TESTS="-k onnx" test       some of the tests
# make TORCH_INDEX=https://… …    another index for PyTorch, such as its own of builds without CUDA (CONTRIBUTING.md)

PYTHON ?= python3
VENV ?= .venv
TESTS ?=
TORCH_INDEX ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two processes of one thread each: small tensors gain nothing from more threads, and a suite does from more processes.
# One that dies ends the run: tests handed on to another have been seen to wait for ever.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

.PHONY: setup demo test test-slow check bench clean

setup: $(READY)

# Runs again only when what is to be installed has changed. PyTorch comes first and by its exact release, so that no
# later requirement can choose another build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test,check]'
	@touch $@

demo: setup
	$(BIN)/python examples/fashion_mnist/demo.py

test: setup
	$(PYTEST) $(TESTS)

test-slow: setup
	$(PYTEST) -m slow $(TESTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	set -e; for script in $(filter-out %_peer.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist out *.egg-info
	find featherweight tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
