# `make run` and `make test` do everything that a fresh clone needs; all that they install goes to the folder itself.
PYTHON ?= python3
BIN := .venv/bin
EXAMPLES := examples/requirements
INSTALL := install --quiet --disable-pip-version-check --require-hashes
COMPILE := $(BIN)/pip-compile $(UPGRADE)

.PHONY: setup run test check examples lock bench clean

# Everything that `make check`, `make lock` and pytest need.
setup: .venv/.done-dev

run: .venv/.done
	exec $(BIN)/python -m inference_api

test: check examples
	$(BIN)/pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The environment of tests/examples: the service beside everything that its examples need.
examples: .venv-examples/.done

# Exact versions with hashes of all that the *.in files ask for; the options are in pyproject.toml. A version stays as
# it is unless an *.in file rules it out: `make lock UPGRADE=--upgrade` takes the newest. The order is that of their -c.
lock: setup
	$(COMPILE) requirements.in
	$(COMPILE) requirements-dev.in
	$(COMPILE) -o $(EXAMPLES)/sentiment.txt $(EXAMPLES)/sentiment.in
	$(COMPILE) -o $(EXAMPLES)/language.txt $(EXAMPLES)/language.in
	$(COMPILE) -o $(EXAMPLES)/digits.txt $(EXAMPLES)/digits.in
	$(COMPILE) -o $(EXAMPLES)/onnx.txt $(EXAMPLES)/onnx.in
	$(COMPILE) -o $(EXAMPLES)/export.txt $(EXAMPLES)/export.in

bench: .venv/.done
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-examples .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python .venv-examples/bin/python:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer: make PYTHON=…')"
	$(PYTHON) -m venv $(@:/bin/python=)

.venv/.done: requirements.txt | .venv/bin/python
	.venv/bin/pip $(INSTALL) -r requirements.txt
	touch $@

.venv/.done-dev: requirements-dev.txt .venv/.done
	.venv/bin/pip $(INSTALL) -r requirements-dev.txt
	touch $@

.venv-examples/.done: requirements.txt $(wildcard $(EXAMPLES)/*.txt) | .venv-examples/bin/python
	.venv-examples/bin/pip $(INSTALL) $(patsubst %,-r %,$(filter %.txt,$^))
	touch $@
