# Two commands matter: `make demo` runs the main job, `make test` passes the tests. Each sets itself up.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The build of sam2 asks for torch too; without the constraint it would take the newest one, with CUDA.
INSTALL := SAM2_BUILD_CUDA=0 PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install -q
BUF := npx --yes @bufbuild/buf@1.75.0
CODE := service engines benchmarks tests deploy proto/generate.py

.PHONY: demo test check format lint types contract clean

demo: $(VENV)/.run
	$(BIN)/trocar demo --out out/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: format lint types contract test

format: $(VENV)/.dev
	$(BIN)/ruff format --check $(CODE)

lint: $(VENV)/.dev
	$(BIN)/ruff check $(CODE)

types: $(VENV)/.dev
	$(BIN)/mypy

contract: $(VENV)/.dev
	$(BUF) lint
	$(BUF) format --diff --exit-code
	$(BUF) breaking --against proto/baseline.binpb
	$(BIN)/python proto/generate.py --check

$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out .mypy_cache .pytest_cache .ruff_cache
