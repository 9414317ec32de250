PYTHON ?= python3
BIN := .venv/bin

.PHONY: train train-tiny test lint bench clean

train: .venv/ready
	@if $(BIN)/python -m pe.models smollm2-135m; then set -x; \
	$(BIN)/python -m pe.train recipes/smollm2-135m.yaml --fresh; \
	else echo "no SmolLM2-135M without a package index: training recipes/tiny.yaml, on models of this repository"; \
	set -x; $(BIN)/python -m pe.train recipes/tiny.yaml --fresh; fi

train-tiny: .venv/ready
	$(BIN)/python -m pe.train recipes/tiny.yaml --fresh

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
