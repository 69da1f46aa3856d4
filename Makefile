# Every target makes .venv itself, from python3 and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# 4 x 256 random tokens, against LoRA without dropout and full finetuning
TRAIN_STEP := --batch 4 --length 256 --documents 1 --steps 2 --text "" --lora-dropout 0 --output benchmarks/results/train_step.json

.PHONY: help demo test test-all lint bench clean

help:                   ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /make \1\t/'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "smf needs Python 3.11 or newer; with another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

demo: $(STAMP)          ## the whole comparison on the embedded world: table, and runs/demo/report.html (OPTIONS=... of smf demo)
	$(BIN)/smf demo $(OPTIONS)

test: $(STAMP)          ## the fast tests (minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-all: $(STAMP)      ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)          ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)         ## benchmarks, about two hours on two idle cores; results go to benchmarks/results/ (docs/speed.md)
	for name in memory_growth row_step search background reading step_rules epochs demo; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/qwen_shape.py $(TRAIN_STEP)

clean:                  ## remove the environment and builds
	rm -rf $(VENV) dist build
