# make run: the quickstart. make test: the tests. Both make .venv when it is missing or pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.gptlab-ready

.PHONY: run test lint env clean
run: $(READY)
	@$(BIN)/gptlab train experiment=quickstart

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

env: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("gptlab needs Python 3.11 to 3.13: make PYTHON=python3.12" if not (3, 11) <= sys.version_info < (3, 14) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
