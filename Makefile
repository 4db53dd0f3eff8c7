# `make smoke` and `make test` work on a fresh machine with Python 3.10 to 3.12 and no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: smoke test test-all lint clean

smoke: $(VENV)/.installed
	$(BIN)/dsv3 train smoke
	$(BIN)/dsv3 generate runs/smoke --prompt "def " --max-tokens 60

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dsv3_train cli

# Of runs and data only what `make smoke` made: others may have taken days.
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -rf runs/smoke data/smoke

# torch by its exact version first: left to a range, pip takes the newest build, with gigabytes of CUDA.
$(VENV)/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@
