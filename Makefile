# Each target sets up all that it needs: a virtual environment, installed from pyproject.toml under constraints.txt.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# The other end of the range of transformers, everything else as in constraints.txt.
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.20.2
# What lmms-eval needs to start; all that it names would bring an older protobuf than constraints.txt has.
LMMS_EVAL := .venv-lmms-eval
LMMS_EVAL_NEEDS := evaluate loguru pytablewriter pytz sacrebleu tenacity

.PHONY: quickstart test test-oldest test-lmms-eval test-serve clean

quickstart: $(VENV)/.installed
	$(BIN)/python recipes/finetune.py --config configs/quickstart.yaml

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-oldest: $(OLDEST)/.installed-dev
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "core and not slow and not gpu"

test-lmms-eval: $(LMMS_EVAL)/.installed-dev
	$(LMMS_EVAL)/bin/python -m pytest -m lmms_eval tests/test_lmms_eval.py

test-serve: $(VENV)/.installed-dev
	$(BIN)/pip install -q -c constraints.txt -e ".[serve]" openai
	$(BIN)/python -m pytest -m serve tests/test_serve.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed

$(OLDEST)/.installed-dev: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(OLDEST)
	sed "s/^transformers==.*/transformers==$(OLDEST_TRANSFORMERS)/" constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install -q -c $(OLDEST)/constraints.txt -e ".[dev]"
	touch $@

$(LMMS_EVAL)/.installed-dev: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(LMMS_EVAL)
	$(LMMS_EVAL)/bin/pip install -q -c constraints.txt -e . pytest $(LMMS_EVAL_NEEDS)
	$(LMMS_EVAL)/bin/pip install -q -c constraints.txt --no-deps lmms-eval
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(LMMS_EVAL)
