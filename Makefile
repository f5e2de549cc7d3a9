# Two commands: `make train` and `make test`. Either makes its virtual environment first, with nothing but python3 and
# pip at hand. Every variable can be set on the command line: make test PYTHON=python3.12 VENV=.venv-312

PYTHON ?= python3
VENV ?= .venv
# What `make test-latest` looks for, newest first, and where it installs it.
NEWER ?= 3.14 3.13 3.12
VENV_LATEST ?= .venv-latest
# Where `make test-compile` installs what compiles for machines that are not here.
VENV_TPU ?= .venv-tpu
VENV_GPU ?= .venv-gpu
# Flags for the experiment (make train ARGS="--steps 100") and for pytest.
ARGS ?=
PYTEST_ARGS ?= --numprocesses auto --dist worksteal

# What `make records` runs.
RECORDED ?= bounds large_system regimes geometry adaptive signprox sweep cost wire

# Twice as many threads as the 8 host devices: with fewer, jax 0.10 can deadlock in a plain training loop.
export NPROC ?= 16

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-latest compilers test-compile records check format notebooks docs figures dist newest-python clean

help: ## Say what there is.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null || \
	  sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' $(MAKEFILE_LIST)

train: $(VENV)/.installed-experiments ## Train a Flax model with 8 workers and a 1-bit vote; flags in ARGS="--steps 100".
	$(VENV)/bin/python -m experiments train $(ARGS)

test: $(VENV)/.installed-test ## Run every test but the slow ones; pytest's flags in PYTEST_ARGS.
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test ## Run the slow tests, too.
	$(VENV)/bin/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

records: $(VENV)/.installed-experiments ## Run the experiments of a few minutes, keep their records, write their tables.
	for name in $(RECORDED); do \
	  $(VENV)/bin/python -m experiments $$name && $(VENV)/bin/python -m experiments report --keep results/$$name || exit 1; \
	done
	$(VENV)/bin/python -m experiments report

test-latest: ## The same with the newest Python at hand, if it is newer than PYTHON.
	@newest="$$($(MAKE) --silent --no-print-directory newest-python)"; \
	if [ -z "$$newest" ]; then echo "test-latest: no Python newer than '$(PYTHON)' among $(NEWER); nothing to do."; \
	else $(MAKE) --no-print-directory test PYTHON="$$newest" VENV="$(VENV_LATEST)"; fi

compilers: $(VENV_TPU)/.installed $(VENV_GPU)/.installed # what the next one needs, 2.4 GB

test-compile: $(VENV)/.installed-test compilers ## Compile votes for TPUs and GPUs, which need not be here.
	SIGNOPT_TPU_PYTHON=$(VENV_TPU)/bin/python SIGNOPT_GPU_PYTHON=$(VENV_GPU)/bin/python \
	  $(VENV)/bin/python -m pytest --numprocesses 0 tests/test_compile.py

check: $(VENV)/.installed-dev ## Check format, style and types.
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.installed-dev ## Format, and mend what ruff can mend.
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

notebooks: $(VENV)/.installed-test ## Execute the notebooks in place.
	$(VENV)/bin/jupyter-execute --inplace --timeout 600 $(wildcard notebooks/*.ipynb)

docs: $(VENV)/.installed-docs ## Build the documentation's pages in docs/_build/html; warnings are errors.
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -W --keep-going -b html docs docs/_build/html

figures: $(VENV)/.installed-experiments ## Draw the documentation's figures from the records in experiments/measured.
	$(VENV)/bin/python docs/gallery/draw.py $(ARGS)

# The wheel is tried where nothing else is: in a new environment and an empty folder, on the README's first program.
dist: $(VENV)/.installed-dist ## Build sdist and wheel in dist/, and try the wheel in an empty environment.
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .
	$(VENV)/bin/python -m twine check --strict dist/*
	@folder="$$(mktemp -d)" && trap 'rm -rf "$$folder"' EXIT && \
	$(PYTHON) -m venv "$$folder/venv" && \
	"$$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check dist/*.whl && \
	awk '/^```python$$/ {inside = 1; next} /^```$$/ && inside {exit} inside' README.md > "$$folder/first.py" && \
	cd "$$folder" && venv/bin/python first.py && echo "dist: the README's first program runs with the wheel alone."

clean: ## Remove the virtual environments, and what was built.
	rm -rf $(VENV) $(VENV_LATEST) $(VENV_TPU) $(VENV_GPU) dist docs/_build docs/api docs/notebooks docs/project docs/gallery/index.md

# A fresh environment for an interpreter, and a stamp for each extra installed into it.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "signopt needs Python 3.11 or newer; '$(PYTHON)' is not. Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its ensurepip is missing. On Debian or Ubuntu install it with" \
	    "'apt install python3-venv'; or name another interpreter: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# Each plugin goes with one version of JAX.
$(VENV_TPU)/.installed: PLUGIN = "libtpu==0.0.42.*"
$(VENV_GPU)/.installed: PLUGIN = "jax-cuda12-plugin==0.10.2" "jax-cuda12-pjrt==0.10.2"
$(VENV_TPU)/.installed $(VENV_GPU)/.installed: Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check jax==0.10.2 "jaxtyping>=0.3" "optax>=0.2.8" $(PLUGIN)
	@touch $@

# Prints the first of NEWER that is newer than PYTHON and starts. Names in PATH may be pyenv's shims, which start only
# the versions that pyenv is told to.
newest-python:
	@for version in $(NEWER); do \
	  for interpreter in "python$$version" "env PYENV_VERSION=$$version python$$version"; do \
	    found="$$($$interpreter -c 'import ensurepip, sys, venv; print(sys.executable)' 2>/dev/null)" || continue; \
	    $(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] >= tuple(map(int, '$$version'.split('.'))))" || exit 0; \
	    echo "$$found"; exit 0; \
	  done; \
	done
