# make demo    a video from a text prompt, on the CPU, with the model that ships in the package
# make test    lint and the whole test suite
# make lint    ruff format, ruff check, mypy
# make clean   remove what these made
#
# Variables: PYTHON=python3.12 chooses the interpreter, VENV=dir the environment, PYTEST_ARGS="-k vae" is passed on,
# WORKERS=8 runs the tests in so many processes of one thread.
# pip takes its package index from its own configuration, so mirrors and a CPU-only torch index work as usual
# (docs/troubleshooting.md, "The install downloads gigabytes").

VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint lint-format lint-rules lint-types clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	@$(BIN)/kinema demo

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: lint-format lint-rules lint-types

lint-format: $(VENV)/.installed-test
	@$(BIN)/ruff format --check --quiet . || { echo "to mend this: $(BIN)/ruff format ." >&2; exit 1; }

lint-rules: $(VENV)/.installed-test
	@$(BIN)/ruff check --quiet . || { echo "to mend what can be: $(BIN)/ruff check --fix ." >&2; exit 1; }

lint-types: $(VENV)/.installed-test
	@$(BIN)/mypy src

# One stamp a step, touched only when the step has succeeded: a second run installs nothing, a broken one starts again.

$(VENV)/.created:
	@python="$$(sh .ci/find-python $(PYTHON))" || exit 1; \
	 echo "creating $(VENV) with $$python"; \
	 "$$python" -m venv --clear "$(VENV)"
	@touch $@

# torch first and alone: the largest download fails early, and pip never weighs another build against it.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	$(PIP) install -c constraints.txt "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml src/kinema/version.py
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
