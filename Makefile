# `make demo` and `make test` need Python >= 3.11 and nothing else; both make .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := bash
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow test-clients explore docs bench mutants lint format lock clean

help:
	@echo 'make demo       record routing of the bundled model, compare policies on it, run live'
	@echo 'make test       lint, types and the fast tests'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make explore    the property tests with examples that no run has drawn before'
	@echo 'make test-clients  the server with clients as their users start them: 616 MB more'
	@echo 'make docs       the documentation as pages to open from a folder: site/index.html'
	@echo 'make bench      the speed of simulator and recorder on this machine'
	@echo 'make mutants    which changes of MODULE its TESTS let through'
	@echo 'make lock       requirements.lock and the list of licences anew'
	@echo 'make install    only make $(VENV) with everything in it'

install: $(INSTALLED)

# hqq tries to build CUDA kernels from source unless told not to; nothing here uses them.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12' >&2; exit 1; }
	@echo '1 of 3: making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)
	@echo '2 of 3: installing the packages of constraints.txt: 3 GB with the CPU build of PyTorch, more with the'
	@echo '        CUDA build, which pip takes on Linux by default; minutes, by the network'
	@began=$$(date +%s) && DISABLE_CUDA=1 $(BIN)/python -m pip install --disable-pip-version-check \
	  --progress-bar off -c constraints.txt -e '.[run,serve,ray,dev]' \
	  | grep --line-buffered -E '^(Collecting|  Downloading|Building|Installing|Successfully)' | cut -c1-100 \
	  ; test $${PIPESTATUS[0]} -eq 0 && echo "        $$(( $$(date +%s) - began )) s, $$(du -sh $(VENV) | cut -f1) in $(VENV)"
	@echo '3 of 3: compiling the simulator, once, so that the first answer takes seconds: 10 to 30 s'
	-@$(BIN)/python -m moesim.ahead
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

# Elsewhere a test draws the same examples in every run: see tests/conftest.py.
explore: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'hypothesis and not gpu' \
	  --hypothesis-profile explore

# They are not in CI: the harness, llama-benchy and guidellm bring some seventy packages.
test-clients: $(INSTALLED)
	@$(BIN)/python -c 'import guidellm, llama_benchy, lm_eval' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[clients]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/runtime/serving/test_clients.py

# Nothing is fetched once the extra is installed: neither the pages nor building them needs a network.
docs: $(INSTALLED)
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings_handlers.python' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'open site/index.html'

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv is in no extra; it needs PyTorch's CPU build: see .ci/supply.py.
lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/supply.py

clean:
	rm -rf $(VENV) demo site .mypy_cache .ruff_cache .pytest_cache

bench: $(INSTALLED)
	$(BIN)/python benchmarks/simulator_speed.py
	$(BIN)/python benchmarks/record_overhead.py

# cosmic-ray is in no extra: it brings a web client and a database along.
MODULE ?= traces/moeroute/check.py
TESTS ?= tests/traces/test_validation.py

mutants: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt cosmic-ray
	$(BIN)/python benchmarks/mutants.py $(MODULE) $(TESTS)
