# Set-up, tests and the quickstart. `make` or `make help` lists the targets.
#
# The environment is .venv; stamp files in it carry the checksum of the lock files (and of pyproject.toml), so a
# second call installs nothing and a changed lock sets up again. The stamp is written last: what an interrupted
# set-up left has none, and is removed before the next try.

SHELL := /bin/bash
BIN := .venv/bin
LOCKS := requirements/cpu-bootstrap.lock requirements/cpu.lock
STACK := .venv/.stack-$(shell cat $(LOCKS) | cksum | cut -d' ' -f1)
READY := .venv/.ready-$(shell cat $(LOCKS) pyproject.toml | cksum | cut -d' ' -f1)
IS_311 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p $(IS_311) 2>/dev/null && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
PIP_INSTALL := $(PIP) install --root-user-action=ignore
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow lint clean

help:
	@echo 'make quickstart  set up .venv if needed, then run the main job on an embedded catalog'
	@echo 'make test        set up .venv if needed, then ruff and the tests that take no minutes'
	@echo 'make test-slow   the tests that take minutes'
	@echo 'make lint        ruff check, ruff format --check, mypy'
	@echo 'make setup       set up .venv only (PYTHON=... names the interpreter; 3.11)'
	@echo 'make clean       remove caches and build leftovers; keeps .venv, runs/, store/'

setup: $(READY)

$(STACK):
	@if [ -z '$(PYTHON)' ]; then echo 'error: no Python 3.11 found; install it or name it: make PYTHON=/path/to/python3.11' >&2; exit 2; fi
	@$(PYTHON) $(IS_311) || { echo "error: PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not runnable), expected Python 3.11" >&2; exit 2; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo 'error: no C compiler found (cc or gcc); DeepSpeed needs one' >&2; exit 2; }
	@echo 'setting up .venv: a few minutes, once'
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) -r requirements/cpu-bootstrap.lock -c requirements/cpu.lock
	@echo 'torch and build tools are in; installing the other packages'
	@$(PIP_INSTALL) --no-deps --no-build-isolation -r requirements/cpu.lock
	@touch $@

$(READY): $(STACK)
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@rm -f .venv/.ready-* && touch $@
	@echo '.venv is ready'

quickstart: $(READY)
	@$(BIN)/genrec run configs/quickstart.yaml

test: $(READY)
	@$(BIN)/ruff check --quiet . && $(BIN)/python -m pytest -m 'not slow and not alone' -n $(TEST_WORKERS) --dist loadfile \
		&& $(BIN)/python -m pytest -m 'not slow and alone' \
		&& echo 'make test: all passed' || { echo 'make test: FAILED' >&2; exit 1; }

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow \
		&& echo 'make test-slow: all passed' || { echo 'make test-slow: FAILED' >&2; exit 1; }

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find genrec_dist launcher tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
