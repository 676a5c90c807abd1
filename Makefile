# SPDX-License-Identifier: Apache-2.0
# Everything runs from here in .venv, which the first target makes: Python >= 3.10, a C++ compiler
# and make are needed, nvcc is used where it is. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# The CPU build where the index has one under this name; elsewhere name an index that has:
# TORCH_INDEX=URL. On a machine with a GPU the same name brings a CUDA build.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
CLANG_FORMAT := git ls-files '*.cpp' '*.h' '*.cu' | xargs $(BIN)/clang-format

.DEFAULT_GOAL := help
.PHONY: help setup test demo lint format bench docs gpu-check clean print-torch

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

setup: $(VENV)/ready  ## make .venv and build into it

test: $(VENV)/ready  ## run the tests
	STRUCTMAT_REQUIRE_EMULATED=1 $(BIN)/python -m pytest tests

demo: $(VENV)/ready  ## compress a sentence encoder and show what was lost and gained
	$(BIN)/structmat demo

lint: $(VENV)/ready  ## formats, lints and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(CLANG_FORMAT) --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/ready  ## bring all files into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(CLANG_FORMAT) -i

bench: $(VENV)/ready  ## measure every operator; results in bench/out
	for bench in bench/bench_*.py; do $(BIN)/python $$bench || exit; done

docs: $(VENV)/ready  ## write the API reference from the docstrings
	$(BIN)/python docs/make_api.py

gpu-check:  ## on a machine with a GPU: build, test, sanitize, measure (docs/gpu-check.md)
	bench/gpu_check.sh

print-torch:
	@echo "$(TORCH)"

clean:  ## remove what was built; keep .venv's packages
	rm -rf build dist bench/out docs/_site demo-out $(VENV)/ready

# ---- The environment ----------------------------------------------------------------------
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "structmat needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/packages: constraints.txt | $(VENV)/bin/python
	@echo "Installing packages into $(VENV)"
	$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(PIP) scikit-build-core pybind11 scipy-openblas32 cmake ninja
	@touch $@

# Importing structmat rebuilds what changed in the C++ sources, so that only the metadata matters here.
$(VENV)/ready: $(VENV)/packages pyproject.toml
	@echo "Building structmat"
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[dev]' \
	  $(addprefix --config-settings=,build-dir=build/editable editable.rebuild=true \
	    editable.verbose=false cmake.define.STRUCTMAT_EMULATE=ON cmake.define.STRUCTMAT_WERROR=ON)
	@touch $@
