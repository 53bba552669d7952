# `make demo` and `make test` set up what they need in .venv, from Python >= 3.11 alone. `make test-oldest` runs the
# suite with the oldest PyTorch that is promised, in .venv-oldest.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
OLDEST_TORCH := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1.0/p' pyproject.toml)
TRITON := 3.6.0

.PHONY: demo test test-oldest suite check setup clean

demo: $(VENV)/.demo
	$(BIN)/emulus demo

test: check suite

test-oldest:
	$(MAKE) VENV=.venv-oldest TORCH=$(OLDEST_TORCH) suite

# Each test process has one thread: several that share CPUs would wait for one another.
suite: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.dev

$(VENV)/.demo: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Emulus needs Python 3.11, 3.12 or 3.13; none was found"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e .
	@touch $@

# The kernels for GPUs are built and interpreted in tests also where PyTorch comes without Triton. Those tests are
# skipped where it cannot be had.
$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	@case "$$(uname -sm)" in "Linux x86_64" | "Linux aarch64") \
		$(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --no-deps triton==$(TRITON) || true;; esac
	@touch $@

clean:
	rm -rf .venv .venv-oldest runs build dist src/*.egg-info
