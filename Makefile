# make train         train a small GPT on real text, in minutes, on any machine
# make test          format, lint, types, declared imports and tests
# make test-faults   the tests that kill and damage runs again and again
# make gpu-check     what only a GPU can show: bits, every regularizer, resume, a benchmark with a profile
# make soak          strike runs at random for ten minutes (MINUTES=10); each must end as if nothing had happened
# make mutants       plant deliberate bugs, one at a time, to see that the tests notice (ONLY=word: some of them)
# All make .venv and install what they need the first time.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: help train test test-faults gpu-check soak mutants clean

help:
	@sed -n 's/^# //p' Makefile

train: .venv/train.installed
	$(BIN)/python train.py configs/quickstart.yaml

test: .venv/test.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry .
	$(BIN)/python -m pytest

test-faults: .venv/test.installed
	$(BIN)/python -m pytest -m slow --timeout 600

gpu-check: .venv/test.installed
	WELLPOSED_GPU_CHECK=1 $(BIN)/python -m pytest -n 0 -m gpu -rs -s tests/test_gpu.py

soak: .venv/test.installed
	PYTHONPATH=.:tests:tests/faults $(BIN)/python tests/faults/soak.py --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

mutants: .venv/test.installed
	$(BIN)/python tests/mutants.py --only "$(ONLY)"

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "wellposed needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/train.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/test.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ .venv/train.installed
