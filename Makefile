# Each target sets up what it needs: .venv is made and filled on first use, and refreshed when its inputs change.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart quickstart-data quickstart-s3 quickstart-video test test-full test-gpu lint

quickstart: .venv/ready
	$(BIN)/python tools/quickstart.py $(if $(CONTINUE),--continue) $(if $(STEPS),--steps $(STEPS))

quickstart-s3: .venv/ready
	$(BIN)/python tools/quickstart.py --s3 $(if $(CONTINUE),--continue) $(if $(STEPS),--steps $(STEPS))

quickstart-video: .venv/ready
	$(BIN)/python tools/quickstart.py --video $(if $(CONTINUE),--continue) $(if $(STEPS),--steps $(STEPS))

quickstart-data: .venv/ready
	$(BIN)/python tools/quickstart.py --only-data

test: lint
	$(BIN)/python -m pytest -m "not full and not gpu"

test-full: lint
	$(BIN)/python -m pytest -m "not gpu"

# Where torch is a build for NVIDIA GPUs; one GPU is enough.
test-gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned, so that no other package's requirement picks a build for us.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
