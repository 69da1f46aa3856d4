# Every target makes .venv itself, from python3 and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BASE   ?= ../shared/models/tinystories-656k
DATA   ?= ../shared/data

.PHONY: help demo test test-all lint bench clean

help:                   ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /make \1\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

demo: $(STAMP)          ## the first comparison, on a base and data of yours (BASE=folder-or-hub-name, DATA=folder-or-hub)
	$(BIN)/smf compare local_example.toml --base '$(BASE)' --data '$(DATA)' --output runs/local_example

test: $(STAMP)          ## the fast tests (minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-all: $(STAMP)      ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)          ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)         ## benchmarks; results go to benchmarks/results/
	$(BIN)/python benchmarks/memory_growth.py

clean:                  ## remove the environment and builds
	rm -rf $(VENV) dist build
