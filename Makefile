# Every target does its own set-up: a virtual environment with the versions of constraints.txt, made again when they change.
# PYTHON=python3.12 picks the interpreter, WORKERS=8 the test processes, BENCH=name one benchmark, OFFSET=2000 the other
# keys of the shifted run in test-all.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BENCH ?=
OFFSET ?= 1000

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
BENCH_VENV := .venv-bench
BENCH_INSTALLED := $(BENCH_VENV)/.installed

# The libraries that we compare with. Torch first: pip then keeps the build that suits the machine. Some without their
# dependencies: the metadata of GPflow and particles ask for numpy < 2, their code does not.
TORCH := torch==2.13.0
ALONE := gpflow==2.11.2 particles==0.4 cuthbert==0.1.1 cuthbertlib==0.1.1
, := ,
install_peers = $(1)/python -m pip install -qq $(TORCH) \
	&& $(1)/python -m pip install -qq -e '.[$(2)]' -c constraints.txt \
	&& $(1)/python -m pip install -qq --no-deps $(ALONE)

PYTEST = OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python keeps what it compiled, whatever the shell says: reading the tests anew takes each process 20 s more.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install demo test test-all lint format bench clean

help:  ## say what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | expand -t 12

install: $(INSTALLED)  ## make the virtual environment

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -e '.[dev,lm]' -c constraints.txt
	touch $@

$(PEERS): $(INSTALLED)
	$(call install_peers,$(BIN),bench$(,)dev$(,)lm)
	touch $@

$(BENCH_INSTALLED): pyproject.toml constraints.txt
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	$(call install_peers,$(BENCH_VENV)/bin,bench$(,)lm)
	touch $@

demo: $(INSTALLED)  ## the demo on bundled data, with a report in probinfer-report/
	$(BIN)/probinfer demo

test: $(INSTALLED)  ## the fast tests, with and without 64-bit floats
	JAX_ENABLE_X64=1 $(PYTEST) -m "not slow"
	JAX_ENABLE_X64=0 $(PYTEST) -m "f32 and not slow"

test-all: $(PEERS)  ## the slow tests too, with the peers installed, and the stochastic ones with other keys
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 JAX_ENABLE_X64=1 $(PYTEST)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 JAX_ENABLE_X64=0 $(PYTEST) -m "f32"
	JAX_ENABLE_X64=1 $(PYTEST) -m "not slow" --only-stochastic --key-offset $(OFFSET)

lint: $(INSTALLED)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## repair style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH_INSTALLED)  ## one question, peers in the same run: make bench BENCH=name
	$(BENCH_VENV)/bin/probinfer bench $(BENCH)

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(BENCH_VENV) build dist probinfer-report .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
