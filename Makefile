# SPDX-License-Identifier: Apache-2.0
# Everything runs from here in .venv, which the first target makes: Python >= 3.10 with venv and its headers,
# a C++20 compiler with OpenMP and make are needed, nvcc is used where it is. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# The index decides which build this is: from PyPI on Linux, the one for CUDA. TORCH_INDEX=URL names an
# index to look in as well; of equal versions pip takes the one with a suffix, such as 2.13.0+cpu.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
CLANG_FORMAT := git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format

# Workers with one thread each, but for the tests that set a number of threads. Tests that share something
# costly to make stay on one worker.
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup test demo lint format bench docs gpu-check clean print-torch

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

setup: $(VENV)/ready  ## make .venv and build into it

test: $(VENV)/ready  ## run the tests
	STRUCTMAT_REQUIRE_EMULATED=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests $(WORKERS)

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
define CHECK_PYTHON
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 10):
    sys.exit("structmat needs Python 3.10 or newer, this is " + sys.version.split()[0])
folders = {sysconfig.get_path("include"), sysconfig.get_config_var("INCLUDEPY")}
missing = [name for name in ("venv", "ensurepip") if not importlib.util.find_spec(name)]
if not any(os.path.isfile(os.path.join(folder, "Python.h")) for folder in folders if folder):
    missing.append("Python.h")
if missing:
    sys.exit("structmat needs " + " and ".join(missing) + " of " + sys.executable
             + " (Debian, Ubuntu: apt install g++ make python3-venv python3-dev)")
endef
export CHECK_PYTHON

$(VENV)/bin/python:
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV)

$(VENV)/packages: constraints.txt | $(VENV)/bin/python
	@echo "Installing packages into $(VENV)"
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(PIP) scikit-build-core pybind11 scipy-openblas32 cmake ninja
	@touch $@

# Importing structmat rebuilds what changed in the C++ sources, so that only the metadata matters here.
$(VENV)/ready: $(VENV)/packages pyproject.toml
	@echo "Building structmat"
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[dev]' \
	  $(addprefix --config-settings=,build-dir=build/editable editable.rebuild=true \
	    editable.verbose=false cmake.define.STRUCTMAT_EMULATE=ON cmake.define.STRUCTMAT_WERROR=ON)
	@touch $@
