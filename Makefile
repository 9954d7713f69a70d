PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-oldest lint bench docs clean

help: ## print this list
	@echo 'Pass arguments to demo, bench or a test target with ARGS: make test ARGS="-k foo"'
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## run `starseg demo`
	$(BIN)/starseg demo $(ARGS)

test: $(VENV)/.installed-dev ## run the tests
	$(BIN)/python -m pytest $(ARGS)

test-oldest: $(OLDEST)/.installed ## test numbers and commands with the oldest supported dependencies
	$(OLDEST)/bin/python -m pytest $(or $(ARGS),tests/replay tests/parity tests/test_config.py tests/test_docs.py)

lint: $(VENV)/.installed-dev ## check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed ## run `starseg bench`
	$(BIN)/starseg bench $(ARGS)

docs: $(VENV)/.installed-dev ## build the documentation into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

clean: ## remove caches and build output (.venv, .venv-oldest and runs/ stay)
	rm -rf dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps are touched only after pip succeeded, so a failed install is tried again.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[dev,docs,lite,export,learn,app]'
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
