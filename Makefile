# `make smoke` and `make test` work on a fresh machine with Python 3.10 to 3.12 and no GPU.
# The Python: PYTHON=..., or else `python3` if it is supported, or else the newest supported one that is there.
SUPPORTED = import sys; sys.exit(not (3, $(1)) <= sys.version_info < (3, 13))
first = $(firstword $(foreach python,$(1),$(shell $(python) -c '$(call SUPPORTED,$(2))' 2>/dev/null && echo $(python))))
PYENV := $(foreach minor,12 11 10,$(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python3))
ifndef PYTHON
PYTHON := $(call first,python3 python3.12 python3.11 python3.10 $(PYENV),10)
endif
VENV := .venv
BIN := $(VENV)/bin
# Megatron-core 0.17 and newer want Python 3.12; for older ones 0.16.1 is the last.
CONSTRAINTS = $(shell $(1) -c '$(call SUPPORTED,12)' 2>/dev/null && echo constraints-newest.txt || echo constraints.txt)
install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2)
# Make expands this before the recipe that makes the environment.
OURS = $(call CONSTRAINTS,$(or $(wildcard $(BIN)/python),$(PYTHON)))
PIP = $(call install,$(VENV),$(OURS))

# The newest stack has an environment of its own, outside the checkout, kept between runs; NEWEST_TESTS: which files.
NEWEST ?= $(HOME)/.cache/dsv3-train/newest
NEWEST_PYTHON ?= $(call first,python3.12 $(filter %/bin/python3,$(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3)),12)
NEWEST_TESTS ?= tests

.PHONY: smoke test test-all test-newest newest newest-python lint clean

smoke: $(VENV)/.installed
	$(BIN)/dsv3 train smoke
	$(BIN)/dsv3 generate runs/smoke --prompt "def " --max-tokens 60

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-newest: newest
	$(NEWEST)/bin/python -m pytest -m "not slow" $(NEWEST_TESTS)

newest-python:
	@echo $(NEWEST_PYTHON)

newest: $(NEWEST)/.installed
	$(call install,$(NEWEST),constraints-newest.txt) --no-deps -e .

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dsv3_train cli

# Of runs and data only what `make smoke` made: others may have taken days.
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -rf runs/smoke data/smoke

# torch by its exact version first: left to a range, pip takes the newest build, with gigabytes of CUDA.
$(VENV)/.installed: setup.py constraints.txt constraints-newest.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "make: dsv3-train needs Python 3.10 to 3.12 and finds none; say PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' $(OURS))
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

$(NEWEST)/.installed: setup.py constraints-newest.txt
	@test -n "$(NEWEST_PYTHON)" || \
		{ echo "make: the newest stack needs Python 3.12 and finds none; say NEWEST_PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(NEWEST)/bin/python || $(NEWEST_PYTHON) -m venv $(NEWEST)
	$(call install,$(NEWEST),constraints-newest.txt) $$(grep '^torch==' constraints-newest.txt)
	$(call install,$(NEWEST),constraints-newest.txt) -e '.[test]'
	touch $@
