# One virtual environment at the root; every target uses it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Build of torch: auto takes the CPU build where pip finds the locked wheel, and what the registry has elsewhere.
TORCH ?= auto
SIDE_BY_SIDE := --numprocesses=2 --dist=loadfile --no-loadscope-reorder
export DS_ACCELERATOR ?= cpu
.DEFAULT_GOAL := help
.PHONY: help env locks locks-check demo test test-slow test-nightly cuda check docs bench season audit sbom release clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-11s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml $(wildcard infra/locks/*.lock) infra/locks/locks.py
	@command -v $(PYTHON) >/dev/null || { echo "rule: Python 3.11 is needed; found none named $(PYTHON). Remedy: make PYTHON=/path/to/python3.11 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python infra/locks/locks.py install $(TORCH)
	touch $@

env: $(STAMP) ## the virtual environment with the locked versions; make -B env TORCH=cpu or TORCH=cuda names torch's build

$(BIN)/uv:
	$(MAKE) env

locks: $(BIN)/uv ## resolve pyproject.toml into infra/locks; UPGRADE=--upgrade for newer versions, see infra/locks/README.md
	$(BIN)/python infra/locks/locks.py compile $(UPGRADE)

locks-check: env ## every requirement of every locked package is locked, by the packages' own metadata
	$(BIN)/python infra/locks/locks.py check

demo: env ## the main job end to end on synthetic Ads data, into runs/demo; make demo ARGS="name=small model.base=minilm-l6"
	$(BIN)/mtl-lora demo $(ARGS)

test: env ## the fast tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-slow: env ## real clusters, two-process training, servers, kills, the weekly loop: three quarters of an hour
	$(BIN)/python -m pytest -m "slow and not nightly" $(SIDE_BY_SIDE) --durations=20

test-nightly: env ## the longest of the slow tests: the whole season, a kill after every stage
	$(BIN)/python -m pytest -m nightly $(SIDE_BY_SIDE) --durations=20

cuda: env ## what must hold on a GPU, on this machine's; where there is none, on a device in name only and on the CPU
	$(BIN)/python -m pytest -m slow tests/pipeline/training/test_device.py
	$(BIN)/python -m pytest -m cuda tests/cuda
	$(BIN)/python -m tests.cuda.speed

check: env ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: env ## the documentation with a reference of every key, command and name as pages, into site, without a network
	$(BIN)/python -m mkdocs build --strict --config-file infra/docs/mkdocs.yml

season: env ## twelve weeks of synthetic Ads data with every fault, through the real loop, into runs/season
	$(BIN)/python -m tests.season

bench: env ## the benchmark tables with goals and ratios, as JSON
	$(BIN)/python -m tests.benchmarks

audit: $(BIN)/uv ## look every locked package up in the known weaknesses; one that cannot be looked up fails
	$(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --strict --disable-pip --require-hashes -r infra/locks/runtime.lock || { echo "rule: each locked package must be found in the advisories, and without a weakness; some are not, see above. Remedy: make locks UPGRADE=--upgrade, or run this where the advisories can be reached" >&2; exit 2; }

sbom: $(BIN)/uv ## what is locked as CycloneDX, into runs/sbom.json
	mkdir -p runs
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements infra/locks/cpu.lock --output-reproducible -o runs/sbom.json

release: env ## wheel, sdist, notes, SBOM and sums of this commit into dist/, the image where Docker answers
	$(BIN)/python infra/release.py

clean: ## delete runs, the documentation's pages and caches, keep the environment
	rm -rf runs site .cache .pytest_cache .mypy_cache .ruff_cache
