# For a fresh clone: `make quickstart` and `make test`. Before a commit: `make check`.
# PYTHON chooses the interpreter of a new environment; PIP_ARGS and PYTEST_ARGS are handed on.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
# OpenMP's threads sleep while they wait; spinning, which is their default, makes torch ten times slower on a busy machine
export OMP_WAIT_POLICY ?= passive

BENCHMARKS_ARGS ?=
MATRIX_ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS_VENV ?= .venv-benchmarks
BENCHMARKS_BIN := $(BENCHMARKS_VENV)/bin
BENCHMARKS_INSTALLED := $(BENCHMARKS_VENV)/.installed
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: help venv quickstart test format lint types versions check benchmarks matrix clean

help:
	@echo "make quickstart  fine-tune SmolLM2-135M to write dictionary definitions, in two to five minutes on two CPU cores"
	@echo "make test        run the tests"
	@echo "make check       what every commit passes: format, lint, types, versions, tests"
	@echo "make format      rewrite the code in the project's format"
	@echo "make benchmarks  measure every figure beside PEFT and other peers, in half an hour, and draw the plots"
	@echo "make matrix      run the core of the tests on every claimed combination of versions; MATRIX_ARGS chooses rows"
	@echo "make clean       remove caches and example outputs; the environment and the model stay"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (1.5 GB, a minute or two)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev,examples]"
	@touch $@

quickstart: $(INSTALLED)
	@$(BIN)/python examples/quickstart.py $(QUICKSTART_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy --strict lightning_lora

versions:
	@grep -q '^__version__ = "$(VERSION)"' lightning_lora/__init__.py || \
	  { echo "lightning_lora.__version__ is not pyproject.toml's $(VERSION)"; exit 1; }
	@grep -q '^## \[$(VERSION)\]' CHANGELOG.md || { echo "CHANGELOG.md has no section [$(VERSION)]"; exit 1; }

check: lint types versions test

# peers of the benchmarks ask for other releases of torch and transformers: each is installed alone, or left out
$(BENCHMARKS_INSTALLED): pyproject.toml constraints.txt benchmarks/requirements.txt
	@echo "Setting up $(BENCHMARKS_VENV) (1.8 GB, two minutes)"
	@test -x $(BENCHMARKS_BIN)/pip || $(PYTHON) -m venv $(BENCHMARKS_VENV)
	@$(BENCHMARKS_BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test,examples]"
	@grep -v '^#' benchmarks/requirements.txt | while read -r peer; do \
	  $(BENCHMARKS_BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --no-deps "$$peer" \
	    || echo "$$peer cannot be installed here, and the results will say so"; \
	done
	@touch $@

benchmarks: $(BENCHMARKS_INSTALLED)
	@OMP_NUM_THREADS=1 $(BENCHMARKS_BIN)/python benchmarks/run.py $(BENCHMARKS_ARGS)
	@$(BENCHMARKS_BIN)/python benchmarks/plot.py

matrix:
	@python3.11 tests/matrix --pip-args '$(PIP_ARGS)' $(MATRIX_ARGS)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info examples/outputs
	find lightning_lora tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
