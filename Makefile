# `make demo` and `make test` do all their own set-up: they find a Python, make a virtual
# environment, install what they need (once; a stamp file remembers) and run.

SHELL := /bin/bash
VENV := .venv
NEWEST := .venv-newest
BIN := $(VENV)/bin
# Of what is installed, a fraction is imported: Python compiles that by itself, in half the time.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile
# Two workers suit a laptop: XLA runs its own threads in each. Who is done first takes half of the tests
# that the other has left, so no long file is left to one worker at the end.
PYTEST_ARGS ?= -n 2 --dist worksteal
# On the newest JAX runs one test in so many, of each file at least one. What the example programs reach, and
# pages in a browser, do not hang on JAX's version; what docstrings show, other tests reach too; type checkers
# look at the oldest. jax2onnx is not installed there: it holds orbax-checkpoint back.
EVERY_NTH ?= 200
NOT_ON_NEWEST ?= --ignore tests/examples --ignore tests/browser --ignore-glob 'statefulnn/*' \
	--ignore tests/test_types.py --ignore tests/parallel/test_page.py --ignore tests/parallel/test_on_paper.py
NEED_JAX2ONNX := --ignore tests/io/test_export_formats.py --ignore tests/examples/test_digits_in_the_browser.py \
	--ignore tests/examples/test_sentences_in_the_browser.py --ignore tests/browser/test_sentences.py \
	--ignore tests/browser/test_without_python.py \
	--deselect "tests/test_docs.py::test_code_of_the_page_runs[docs/export.md]"

.DEFAULT_GOAL := help
.PHONY: help demo install install-oldest newest test test-newest test-long docs docs-test lint format types wheel bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

# What XLA compiled is kept for the next run, for the other worker and for processes that tests start.
# Most programs are small: without this setting JAX would keep those that take a second and more.
test test-newest test-long docs-test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
test test-newest test-long docs-test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

demo: $(VENV)/.stamp-demo  ## train two models and time the compiled step (3 minutes)
	$(BIN)/python examples/demo.py

install: install-oldest newest  # both environments of the tests

install-oldest: $(VENV)/.stamp-test

# Without a Python for it, `make test-newest` says that it is left out.
newest:
	@! .ci/find-python newest >/dev/null 2>&1 || $(MAKE) --no-print-directory $(NEWEST)/.stamp-test

test: $(VENV)/.stamp-test  ## all tests but the long ones, with the code in README, docs and docstrings
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	@echo "the long tests are apart: make test-long"

test-long: $(VENV)/.stamp-test  ## the long tests: examples at full length, and what is left out to be quick
	$(BIN)/python -m pytest -m long

docs-test: $(VENV)/.stamp-test  ## only the code in README, docs and docstrings
	$(BIN)/python -m pytest tests/test_docs.py statefulnn

test-newest:  ## a sample of all tests on the newest JAX, in a second environment (Python 3.12 or newer)
	@if .ci/find-python newest >/dev/null 2>&1; then \
	  $(MAKE) --no-print-directory $(NEWEST)/.stamp-test && \
	  $(NEWEST)/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "JAX", jax.__version__)' && \
	  $(NEWEST)/bin/python -m pytest $(PYTEST_ARGS) $(NOT_ON_NEWEST) $(NEED_JAX2ONNX) --every-nth $(EVERY_NTH); \
	else \
	  echo "test-newest skipped: the newest JAX needs Python 3.12 or newer, and none was found"; \
	fi

docs: $(VENV)/.stamp-docs  ## the documentation site, into out/site; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open $(CURDIR)/out/site/index.html"

wheel: $(VENV)/.stamp-test  ## what is published: built, checked, tried in new environments (EXTRAS=all for each)
	$(BIN)/python .ci/check_wheel.py $(EXTRAS)

lint: $(VENV)/.stamp-test  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.stamp-test  ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.stamp-test  ## pyright on the package; tests/test_types.py has it and mypy on README, docs and examples
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.stamp-bench  ## what a call costs beside raw JAX, Flax NNX and Equinox
	mkdir -p out
	$(BIN)/python benchmarks/dispatch.py --json out/dispatch.json

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(NEWEST) out build dist .pytest_cache .jax_cache .ruff_cache .hypothesis

# On Python 3.11 the oldest supported JAX is installed, so that `make test` guards it.
$(BIN)/python: .ci/find-python
	$$(.ci/find-python oldest) -m venv --upgrade-deps $(VENV)
	@touch $@

$(VENV)/.stamp-demo $(VENV)/.stamp-test $(VENV)/.stamp-docs $(VENV)/.stamp-bench: $(VENV)/.stamp-%: \
		$(BIN)/python pyproject.toml requirements/oldest.txt
	@echo "installing into $(VENV) ($*)"
	@extras=$$(case $* in demo) echo examples;; docs) echo docs;; test) echo dev,docs,examples,onnx,reference;; bench) echo bench;; esac); \
	constraint=$$($(BIN)/python -c 'import sys; sys.version_info[:2] == (3, 11) and print("-c requirements/oldest.txt")'); \
	$(BIN)/pip install $(PIP_FLAGS) $$constraint -e ".[$$extras]"
	@touch $@

$(NEWEST)/.stamp-test: pyproject.toml
	$$(.ci/find-python newest) -m venv --upgrade-deps $(NEWEST)
	@echo "installing into $(NEWEST)"
	@$(NEWEST)/bin/pip install $(PIP_FLAGS) --upgrade -e ".[dev,docs,examples,reference]"
	@touch $@
