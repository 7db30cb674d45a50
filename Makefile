# make run    install, run the quickstart, report       make test   install, run the test suite offline
# make check  format, lint, types                       make install  the environment and the assets alone
# make evidence  verdicts and a figure from experiments/results, and the README's table
# make options   the README's table of methods from the files in conf/
# make soak   kills at random moments, a full disk, lost power, for many minutes (KILLS=50)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= outputs/quickstart
KILLS ?= 50
STAMP := $(VENV)/.installed

.PHONY: install run test soak evidence options check clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m reprune.fetch
	@touch $@

run: install
	$(BIN)/reprune experiments=quickstart output_dir='$(OUT)'
	$(BIN)/reprune-report '$(OUT)'

test: install
	HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 $(BIN)/python -m pytest

soak: install
	HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 REPRUNE_SOAK_KILLS=$(KILLS) $(BIN)/python -m pytest -m soak -s

evidence: install
	$(BIN)/python experiments/make.py

options: install
	$(BIN)/python -m reprune.help README.md

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache
