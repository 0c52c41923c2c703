# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow lint types contracts docs bench ci

demo:
	@EXTRAS=demo VENV=$(VENV) scripts/setup.sh
	$(BIN)/vlmpack demo

test: setup-dev
	$(BIN)/python -m pytest -n auto

.PHONY: setup-dev
setup-dev:
	@EXTRAS=dev VENV=$(VENV) scripts/setup.sh

test-slow: setup-dev
	$(BIN)/python -m pytest -n auto -m slow --timeout=900

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev
	$(BIN)/python -m mypy

contracts: setup-dev
	$(BIN)/lint-imports

docs: setup-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: setup-dev
	$(BIN)/python -m pytest benchmarks --benchmark-disable

ci:
	.ci/run
