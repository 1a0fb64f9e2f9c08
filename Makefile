# `make demo` and `make test` need Python >= 3.11 and nothing else; both make .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow bench mutants lint format clean

help:
	@echo 'make demo       record routing of the bundled model, compare policies on it, run live'
	@echo 'make test       lint, types and the fast tests'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make bench      the speed of simulator and recorder on this machine'
	@echo 'make mutants    which changes of MODULE its TESTS let through'
	@echo 'make install    only make $(VENV) with everything in it'

install: $(INSTALLED)

# hqq tries to build CUDA kernels from source unless told not to; nothing here uses them.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	DISABLE_CUDA=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[run,serve,ray,dev]'
	@touch $@

demo: $(INSTALLED)
	@PATH="$(abspath $(BIN)):$$PATH" bash demo.sh

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache

bench: $(INSTALLED)
	$(BIN)/python benchmarks/simulator_speed.py
	$(BIN)/python benchmarks/record_overhead.py

# cosmic-ray is in no extra: it brings a web client and a database along.
MODULE ?= traces/moeroute/check.py
TESTS ?= tests/traces/test_validation.py

mutants: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt cosmic-ray
	$(BIN)/python benchmarks/mutants.py $(MODULE) $(TESTS)
