# Everything runs from a fresh clone: the targets make the environment they need and bring it up to date
# when pyproject.toml or constraints.txt changes. pip's own settings are honoured.
PYTHON ?= python3
VENV ?= .venv
# More arguments for pytest, `adapterbank demo` or the benchmarks: make test ARGS="-k codec"
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
SOURCES := src tests docs $(wildcard benchmarks examples)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench bench-adaptation bench-adaptation-quick docs clean
.DELETE_ON_ERROR:
# The stamps are wanted files, not intermediate ones that make may delete.
.SECONDARY:

help:
	@echo "make demo    train a few adapters, fit a bank, restore them, print one table"
	@echo "make test    run the tests"
	@echo "make lint    check style and types (make format fixes the style)"
	@echo "make bench   run the benchmarks and rewrite the README tables"
	@echo "make bench-adaptation  run what is missing of the adaptation study (-quick: one row of it again)"
	@echo "make docs    build the documentation into site/"
	@echo "make clean   remove build products and caches; keeps $(VENV) and .cache/"

# torch first: it is by far the largest, and everything after it then finds it in place.
# With an accelerator any torch will do; without one, the build that constraints.txt names.
$(VENV)/.torch: constraints.txt
	@echo "Installing torch into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1; then grep -v '^torch=' $<; else cat $<; fi >$(VENV)/constraints.txt
	@$(PIP) torch
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.torch
	@echo "Installing adapterbank[$*] into $(VENV)"
	@$(PIP) -e ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/adapterbank demo $(ARGS)

# One thread a worker, or the workers fight over the cores. No test may reach for a model hub.
test: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(ARGS)

bench-adaptation: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.adaptation $(ARGS)

bench-adaptation-quick: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.adaptation --quick $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/generate_cli.py
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist site demo-out .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
