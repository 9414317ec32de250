PYTHON ?= python3
BIN := .venv/bin

.PHONY: train train-tiny test lint bench clean

train: .venv/ready
	@if $(BIN)/python -m pe.models smollm2-135m; then \
	  $(BIN)/python -m pe.train recipes/smollm2-135m.yaml --fresh; \
	else \
	  echo "SmolLM2-135M cannot be fetched, so the models of this repository are trained: recipes/tiny.yaml"; \
	  $(BIN)/python -m pe.train recipes/tiny.yaml --fresh; \
	fi

train-tiny: .venv/ready
	$(BIN)/python -m pe.train recipes/tiny.yaml --fresh

test: .venv/ready lint
	$(BIN)/python -m pytest

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
