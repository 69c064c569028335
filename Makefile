# `make` alone lists what there is. Everything lives in .venv; nothing is installed outside this folder.
#   PYTHON=python3.11 make install          another interpreter
#   EXTRAS=wandb,ray,dev make install       other extras
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu make install      the small CPU build of torch

PYTHON ?= python3
EXTRAS ?= wandb,serve,dev
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# As in an activated environment: what runs finds ninja and the other tools by name.
ACTIVE := PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all check check-style check-types check-layers check-shell format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## a virtual environment in .venv with everything, at the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "make: '$(PYTHON)' is missing or older than Python 3.10. Name another: PYTHON=python3.11 make install"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: '$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
		echo "make: no C++ compiler found. DeepSpeed needs one at its first start (Debian and Ubuntu: apt install g++)."
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few minutes, most of them for torch."
	$(PIP) install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

quickstart: $(STAMP) ## train, interrupt, resume and question a tiny ERNIE on this machine: minutes, no network
	$(ACTIVE) $(BIN)/ernie quickstart

test: $(STAMP) ## the tests that any machine can run, in a quarter of an hour
	$(ACTIVE) $(BIN)/pytest -m "not faults and not cluster and not browser"

test-all: $(STAMP) ## also those that kill and freeze runs, and those that start a cluster or a browser
	$(ACTIVE) $(BIN)/pytest

check: check-style check-types check-layers check-shell ## style, types, layers, shell scripts (-k: all of them)

check-style: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check-types: $(STAMP)
	$(BIN)/mypy

check-layers: $(STAMP)
	$(BIN)/lint-imports --no-cache --no-logo

check-shell: $(STAMP)
	$(BIN)/shellcheck $(wildcard .ci/run slurm/*.sbatch)

format: $(STAMP) ## put the code into the one layout, and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP) ## every benchmark, one after another
	@set -e; for name in prepare loader resume save overhead throughput scaling startup head communication planned trainer page; do \
		echo "== $$name"; $(ACTIVE) $(BIN)/python -m benchmarks $$name; done

clean: ## remove the environment, caches and build output (runs and prepared data stay)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
