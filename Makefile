# Everything is installed into .venv in this folder; nothing else on the machine is touched.
# Stamps in .venv say what is installed: a second call is instant, a changed pyproject.toml or constraints file is not.

PORT ?= 8000
MODEL ?=
ARGS ?=
TORCH_INDEX_URL ?=

VENV := .venv
BIN := $(VENV)/bin
PINS := constraints.txt constraints-cpu.txt

SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
CANDIDATES := python3 python3.13 python3.12 python3.11 python
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(SUITABLE)' 2>/dev/null && echo $(p))))

# With a GPU torch is the newest, and brings its own CUDA and Triton; without one both are the pinned releases.
GPU = $(shell nvidia-smi -L 2>/dev/null)
PIP = $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt $(if $(GPU),,-c constraints-cpu.txt)
TOKENLLM = $(PIP) --no-build-isolation -e

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help serve test test-slow test-clients sanitize check load load-gateway bench-cpu bench-ring bench-host bench-gpu router-report lock clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PORT=8000 MODEL=folder|file.gguf|org/name ARGS='more flags' PYTHON=/path TORCH_INDEX_URL=https://…"

serve: $(VENV)/.serve ## install what is missing, then serve MODEL (default: the embedded one) on PORT
	$(BIN)/tokenllm serve $(strip $(MODEL) --port $(PORT) $(ARGS))

test: check ## the checks, then every fast test
	$(BIN)/python -m pytest -m "not slow and not clients"

test-slow: $(VENV)/.test ## the tests that take seconds to minutes each
	$(BIN)/python -m pytest -m slow

test-clients: $(VENV)/.test ## other people's clients against a real server, each in an environment of its own in .venv-clients
	$(BIN)/python -m pytest tests/clients

sanitize: $(VENV)/.test ## the kernels' tests in small under compute-sanitizer, where there is a GPU (ARGS="--tool racecheck")
	KERNEL_SIZES=small PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 $(ARGS) \
		$(BIN)/python -m pytest tests/kernels

check: $(VENV)/.test ## format, lint, types, floors, compose file
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml compose.keys.yaml

load: $(VENV)/.load ## load the server on PORT and report speed and latency (ARGS="--concurrency 1,8,16 …")
	$(BIN)/python load_tests/load.py --base-url http://127.0.0.1:$(PORT)/v1 $(ARGS)

bench-cpu: $(VENV)/.bench ## the embedded model against llama.cpp and transformers on this CPU
	$(BIN)/python load_tests/cpu_peers.py $(ARGS)

bench-ring: $(VENV)/.load ## the ring against a pipe and a queue
	$(BIN)/python load_tests/ring_bench.py $(ARGS)

bench-host: $(VENV)/.load ## what a step costs the scheduler's process beside the model
	$(BIN)/python load_tests/host_bench.py $(ARGS)

load-gateway: $(VENV)/.load ## what the gateway costs, with an engine that has nothing to compute
	$(BIN)/python load_tests/load_gateway.py $(ARGS)

bench-gpu: $(VENV)/.load ## measure the CUDA engine: BENCH=kernels, steps, offline, prefill, idle, serving or startup (ARGS="-h")
	PYTHONPATH=load_tests $(BIN)/python load_tests/gpu/bench_$(or $(BENCH),kernels).py $(ARGS)

router-report: $(VENV)/.load ## every scheduling policy on every load, into docs/scheduling.md (TRACES=folder of full traces)
	$(BIN)/python load_tests/router_report.py $(if $(TRACES),--traces $(TRACES)) $(ARGS)

lock: ## resolve every dependency anew and write constraints.txt (with the oldest Python, so that it fits all)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make lock wants PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install -c constraints-cpu.txt hatchling editables
	$(VENV)-lock/bin/python -m pip install -c constraints-cpu.txt --no-build-isolation -e ".[test,bench]"
	grep '^#' constraints.txt > constraints.new
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable | grep -vE '^(torch|triton|nvidia-.*|cuda-.*|setuptools)==' >> constraints.new
	mv constraints.new constraints.txt
	rm -rf $(VENV)-lock

clean: ## remove the environment and every cache in this folder (downloaded models stay)
	rm -rf $(VENV) $(VENV)-lock .venv-clients build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@test -n '$(PYTHON)' || { echo "tokenllm needs Python 3.11, 3.12 or 3.13 with its venv module, and found none of: $(CANDIDATES)." >&2; \
		echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or say where it is: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(SUITABLE)' || { echo "PYTHON=$(PYTHON) is no Python 3.11, 3.12 or 3.13 with a venv module:" >&2; $(PYTHON) --version >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.serve: $(VENV)/.python pyproject.toml $(PINS)
	@echo "== 1 of 2: PyTorch. The largest download; unpacking it can take a silent minute."
	$(if $(GPU)$(TORCH_INDEX_URL),,@echo "   No GPU found. TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu fetches a much smaller build.")
	$(PIP) --no-deps $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	@echo "== 2 of 2: tokenllm and what it stands on"
	$(PIP) hatchling editables
	$(TOKENLLM) ".$(if $(GPU),[cuda])"
	@touch $@

$(VENV)/.load: $(VENV)/.serve
	$(TOKENLLM) ".[load]"
	@touch $@

$(VENV)/.bench: $(VENV)/.load
	$(TOKENLLM) ".[bench]"
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	@echo "== what the tests need"
	$(TOKENLLM) ".[test]"
	@touch $@ $(VENV)/.load
