# Everything below creates .venv on first use. Python: PYTHON=python3.12 make demo
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/installed  ## pre-train on built-in synthetic people, under 3 minutes on 2 cores
	$(BIN)/python jobs/pretrain.py

test: .venv/installed-dev  ## every test that this machine can run
	$(BIN)/python -m pytest

lint: .venv/installed-dev  ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/installed-dev  ## measured speed, as ratios to literal versions in the same run
	for file in benchmarks/*.py; do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; done

clean:
	rm -rf .venv

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
