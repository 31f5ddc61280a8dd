# make repro   set up and run the pipeline        make test          set up and run every test
# make paper   put the paper's params in place    make cache-import  after `dvc pull`: refill the cache
# make lock    pin the dependencies anew          make bench         measure; figures: BENCHMARKS.md
# make estimate  what the run will take on the disks

PYTHON ?= python3
BIN := .venv/bin
# DVC runs the stages' `python`: it must be the environment's, also in the temporary copies.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup repro test lint paper cache-import estimate lock bench

setup: .venv/.locked

.venv/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"Python {v[0]}.{v[1]} found: this needs 3.11 to 3.13; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	@touch $@

repro: setup
	dvc repro

test: setup lint
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	ruff check .
	ruff format --check .

paper: setup
	@git diff --quiet HEAD -- params.yaml || { echo "params.yaml has changes of yours: commit or restore them first"; exit 1; }
	cp profiles/paper.yaml params.yaml
	@echo "params.yaml now holds the paper's values: put slides and labels.csv in slides/, then dvc repro"

cache-import: setup
	python -m stages.common.cache

estimate: setup
	@python -m stages.estimate

bench: setup
	python -m benchmarks.chain

lock:
	uv pip compile pyproject.toml --extra cellpose --extra czi --extra lora --extra onnx --extra slurm --extra test \
	  --universal --python-version 3.11 --fork-strategy fewest \
	  --generate-hashes --no-annotate --no-header --quiet -o requirements.lock
