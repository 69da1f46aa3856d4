# Every target makes .venv itself from python3 and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: test test-all lint bench demo clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

test: $(STAMP)          ## the fast tests (minutes)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow'

test-all: $(STAMP)      ## every test
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)          ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)         ## benchmarks, written to benchmarks/results/
	$(BIN)/python benchmarks/memory_growth.py

clean:
	rm -rf $(VENV) dist build
