# The two commands of the README are `make repro` and `make test`.
PYTHON ?= python3
VENV := .venv
MADE := $(VENV)/.made
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: venv repro test lint docs

venv: $(MADE)

# Stale when a requirement changed: made anew, so that nothing outdated stays behind.
$(MADE): requirements.txt requirements-dev.txt pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

repro: $(MADE)
	dvc repro

test: $(MADE)
	ruff check .
	ruff format --check .
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(MADE)
	ruff check --fix .
	ruff format .

# Runs every command of the documents in a fresh clone.
docs: $(MADE)
	python tests/documents.py
