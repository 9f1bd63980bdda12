# Two commands matter: `make quickstart` and `make test`. Both make .venv with the pinned packages if it is not there.
# `make help` lists the rest. PYTHON=/path/to/python chooses the interpreter (3.11 or newer).
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help quickstart test check lint format types tpu-compile lock clean

# Tests run in one process per core, at most four; ARGS="tests/test_masks.py -k window" chooses, WORKERS= runs in one.
WORKERS ?= -n auto --maxprocesses=4 --dist worksteal

# Variables that a run on this machine should have; see docs/architecture.md, "Speed on CPU".
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'

quickstart: ## Train small language models with three attentions, compare them, write report.html (under 5 minutes)
	@python=$$(tools/environment) && "$$python" train.py --sweep=configs/sweeps/quickstart.py

test: ## Run all tests (about 20 minutes on 2 cores)
	@python=$$(tools/environment dev) && JAX_PLATFORMS=cpu "$$python" -m pytest $(WORKERS) $(ARGS)

check: lint types ## Linter, formatter and type checker

lint: ## ruff: rules and formatting
	@python=$$(tools/environment dev) && "$$python" -m ruff check . && "$$python" -m ruff format --check .

format: ## ruff: put everything into the house format
	@python=$$(tools/environment dev) && "$$python" -m ruff check --fix . && "$$python" -m ruff format .

types: ## mypy on the packages
	@python=$$(tools/environment dev) && "$$python" -m mypy

tpu-compile: ## Compile every TPU kernel and a sharded training step for v5e, v5p and v6e; no TPU needed
	@python=$$(tools/environment tpu .venv-tpu) && "$$python" benchmarks/tpu_compile.py $(ARGS)

lock: ## Write requirements/ anew from pyproject.toml (needs uv)
	@tools/lock

clean: ## Remove environments, caches and the quick start's runs
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .mypy_cache .hypothesis runs/quickstart
