# PYTHON must be 3.11 or 3.12; the first that runs is taken.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 /usr/bin/python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	&& command -v $$p && break; done)
VENV ?= .venv
# What is installed beside Baton itself: make install EXTRAS=dev,ucx
EXTRAS ?= dev
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)
# What comes after the command: make up ARGS="--decode 2"
ARGS ?=

.PHONY: help install up test lint format protos bench chaos soak clean

help:
	@echo "make up      install, start the mesh on 127.0.0.1:8000 and :9000, Ctrl-C stops it"
	@echo "make test    install and run every test"
	@echo "make lint    ruff, formatting, stale stubs and pages"
	@echo "make format  let ruff rewrite what lint would refuse"
	@echo "make protos  regenerate baton/v1 from protos/baton/v1"
	@echo "make bench   benchmark the endpoint that runs (make up)"
	@echo "make chaos   disturb a mesh under load (ARGS=\"--faults 500\"), needs root"
	@echo "make soak    20,000 short requests, and whether memory and descriptors stay flat"
	@echo "make gpu-check  check and measure the kernels on this machine's NVIDIA GPU"
	@echo "make clean   remove $(VENV) and caches"
	@echo "Variables: ARGS=\"--decode 2\", PYTHON=python3.12, VENV=.venv, EXTRAS=dev,ucx"

install: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one" \
		"(Debian 12: apt install python3 python3-venv) or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit((3, 11) > v or v >= (3, 13))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 or 3.12; run make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

up: $(STAMP)
	@exec $(BIN)/baton up $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/protos.py --check
	$(BIN)/python tools/config_docs.py --check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(STAMP)
	$(BIN)/python tools/protos.py

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos.run $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m tests.soak.run $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/serving.py $(ARGS)

# With the python3 and the packages that the machine has: nothing is installed or fetched.
gpu-check:
	@python3 -m benchmarks.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
