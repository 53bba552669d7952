# Two commands: `make demo` and `make test`. Both set up what they need in .venv, from Python >= 3.11 alone.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test check setup clean

demo: .venv/.demo
	$(BIN)/emulus demo

# Each test process has one thread: several that share CPUs would wait for one another.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/.dev

.venv/.demo: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Emulus needs Python 3.11, 3.12 or 3.13; none was found"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs build dist src/*.egg-info
