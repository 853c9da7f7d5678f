# Two commands for a fresh machine with Python 3.11 or later, pip and make:
#   make demo   installs, then trains Elman, GRU and LSTM on recorded speech and writes a report
#   make test   installs what tests need and runs them all
# And one for a quiet machine:
#   make bench  installs the peers and measures the engine beside them, about twelve minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test bench clean

demo: $(VENV)/installed-tasks
	$(BIN)/throughtime compare vowels

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/speed.py

# What is installed is remembered by a file, so that pip runs again only when the requirements change.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[$*]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) build dist src/*.egg-info
