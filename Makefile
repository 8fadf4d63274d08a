# Every target sets up what it needs: a private .venv with the versions of constraints.txt (CONSTRAINTS= for the newest).
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-all test-versions lint format bench gallery dist clean
help:
	@echo "make demo      draw a little corpus, train on it, caption unseen scenes: demo_output/demo.html"
	@echo "make test      lint and the tests (a few minutes on 2 cores)"
	@echo "make test-all  the tests and the long campaigns"
	@echo "make test-versions  a part of the tests on the oldest and the newest Transformers that setup.cfg allows"
	@echo "make bench     the benchmarks; tables go to benchmarks/results/"
	@echo "make gallery   draw the charts of the docs again and write docs/gallery.md"
	@echo "make lint      ruff check, format check and mypy; make format applies what ruff can"
	@echo "make dist      the wheel and the source distribution, checked, in dist/"

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS)) --editable ".[dev]"
	@touch $@

setup: $(VENV)/installed

demo: setup
	$(BIN)/python scripts/demo.py

test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2

test-all: lint
	$(BIN)/python -m pytest -n 2

test-versions: setup
	$(BIN)/python .ci/test_versions.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/relevance.py
	$(BIN)/python benchmarks/runtimes.py
	$(BIN)/python benchmarks/app.py
	$(BIN)/python benchmarks/help_time.py
	$(BIN)/python benchmarks/bulk.py

gallery: setup
	$(BIN)/python benchmarks/gallery.py

dist: setup
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) .versions build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
