PYTHON ?= python3
BIN := .venv/bin

.PHONY: train train-real test lint bench clean

train: .venv/ready
	$(BIN)/python -m pe.train --fresh

train-real: .venv/ready
	$(BIN)/python -m pe.models smollm2-135m
	$(BIN)/python -m pe.train recipes/smollm2-135m.yaml --fresh

test: .venv/ready lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check pe bench scripts tests
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m pytest bench/ --benchmark-only

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
