PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all test-oldest lint bench docs docs-tables clean

help: ## print this list
	@echo 'Pass arguments to demo, bench or a test target with ARGS: make test ARGS="-k foo"'
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## run `starseg demo`
	$(BIN)/starseg demo $(ARGS)

test: $(VENV)/.installed-dev ## run the tests in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: $(VENV)/.installed-dev ## run all groups of tests (default, slow, kill, processes, browser, gpu)
	$(BIN)/python scripts/test_all.py $(ARGS)

test-oldest: $(OLDEST)/.installed ## test numbers and commands with the oldest supported dependencies
	$(OLDEST)/bin/python -m pytest $(or $(ARGS),tests/replay tests/parity tests/test_config.py tests/test_docs.py)

lint: $(VENV)/.installed-dev ## check formatting, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed ## run `starseg bench`
	$(BIN)/starseg bench $(ARGS)

docs: $(VENV)/.installed-dev ## build the documentation into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

docs-tables: $(VENV)/.installed-dev ## write the tables of options in docs/ from the code
	$(BIN)/python scripts/option_tables.py

clean: ## remove caches and build output (.venv, .venv-oldest and runs/ stay)
	rm -rf dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps are touched only after pip succeeded, so a failed install is tried again.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[dev,docs,lite,export,learn,app,smp,transformers]'
	@touch $@

$(OLDEST)/.installed: pyproject.toml scripts/oldest.py
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) scripts/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -c $(OLDEST)/constraints.txt -e '.[dev,lite,export,learn]'
	@touch $@

# venv puts pip in last: where it is there, the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) -m venv failed. On Debian it needs a package: apt-get install python3-venv" >&2; exit 1; }
