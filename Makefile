# The two commands of the README are `make repro` and `make test`.
PYTHON ?= python3
VENV := .venv
MADE := $(VENV)/.made
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: venv repro test lint docs bench soak

venv: $(MADE)

# What is installed is what the locks hold, by hash, where they fit; elsewhere pip decides on what the
# requirements leave open. PyTorch's CPU build goes before its CUDA build, which brings gigabytes,
# wherever pip is told of one. The first lock builds the project, and what comes as source.
LOCKS := requirements.lock $(patsubst %,requirements-%.lock,build cpu cuda)
LOCKED := cpython-311 linux-x86_64
FOUND = $(shell $(PYTHON) -c "import sys, sysconfig as s; print(sys.implementation.cache_tag, s.get_platform())")
INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check
INSTALL_LOCKED := $(INSTALL) --no-deps --no-build-isolation

# Stale when a requirement changed: made anew, so that nothing outdated stays behind.
$(MADE): requirements.txt requirements-dev.txt $(LOCKS) pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
ifeq ($(FOUND),$(LOCKED))
	$(INSTALL_LOCKED) --require-hashes -r requirements-build.lock
	$(INSTALL_LOCKED) --require-hashes -r requirements.lock
	torch=$$(grep -o '^torch==[^ ]*' requirements-cpu.lock); \
	$(INSTALL_LOCKED) --dry-run "$$torch" > /dev/null 2>&1 && build=cpu || build=cuda; \
	$(INSTALL_LOCKED) --require-hashes -r requirements-$$build.lock
	$(INSTALL_LOCKED) -e .
	$(VENV)/bin/pip check
else
	@echo "The locks are for $(LOCKED), not for $(FOUND): pip decides on what the requirements leave open."
	$(INSTALL) -r requirements-dev.txt
endif
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

# How fast, side by side with what people use today: about 12 minutes on two cores.
bench: $(MADE)
	python benchmarks/run.py

# Killing, fuzzing and ten times the study's tables, for longer than a test may: an hour and more.
soak: $(MADE)
	python benchmarks/soak.py
	python benchmarks/load.py
