# Two commands do everything: `make book` and `make test`.
PYTHON ?= python3
PARAMS ?= cpu
BOOKFLAGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env book test lab check clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## create .venv from requirements.lock; quick when it is up to date

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV) (minutes the first time)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

book: env  ## run every notebook and render the book; PARAMS=smoke for the quick version
	@$(RUN) -m nmlib run --params $(PARAMS)
	@$(RUN) -m nmlib book --params $(PARAMS) $(BOOKFLAGS)

test: env  ## run the tests
	@$(RUN) -m pytest

lab: env  ## open JupyterLab on the notebooks
	@$(RUN) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

check: env  ## formatting, lint and types
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

clean:  ## remove what the book build and the tools made; runs and .venv stay
	rm -rf _build book/chapters book/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find nmlib tests notebooks -name __pycache__ -prune -exec rm -rf {} +
