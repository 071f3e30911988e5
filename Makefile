# Two commands matter: `make lab` for learners, `make test` for everyone who changes something.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: lab test lint build pins clean

lab: $(VENV)/.lab
	@$(BIN)/course lab

# A file of tests stays in one process; files start in the order of testpaths, the long ones first.
test: $(VENV)/.test lint
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/course lint
	$(BIN)/course build --check

build: $(VENV)/.test
	$(BIN)/course build

# Writes what is installed now to constraints.txt; meant for a fresh environment made without it.
pins: $(VENV)/.test
	{ head -2 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' \
	  | grep -v -i -E '^(pip|setuptools|wheel)=='; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: install Python 3.11, or name yours with 'make PYTHON=/path/to/python3.11'"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu install python3.11-venv"; exit 1; }

$(VENV)/.lab: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the course into $(VENV) (about three minutes the first time)."
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.lab
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.lab
