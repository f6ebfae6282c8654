# The two commands of the README are `make repro` and `make test`.
PYTHON ?= python3
VENV := .venv
MADE := $(VENV)/.made
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: venv repro test lint docs real bench gpu soak

venv: $(MADE)

# Where the locks fit, exactly what they hold is installed, checked by hash; elsewhere pip decides on
# what the requirements leave open. PyTorch's CPU build is taken if pip knows an index or folder that
# has it, else the CUDA build, which brings gigabytes. The first lock builds the project.
LOCKS := requirements.lock $(patsubst %,requirements-%.lock,build cpu cuda)
LOCKED := cpython-311 linux-x86_64
FOUND = $(shell $(PYTHON) -c "import sys, sysconfig as s; print(sys.implementation.cache_tag, s.get_platform())")
INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check
INSTALL_LOCKED := $(INSTALL) --no-deps --no-build-isolation

# Made anew when a requirement changed, so that nothing outdated stays behind.
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

# One thread for each of the two test workers: more would oversubscribe two cores.
test: $(MADE)
	ruff check .
	ruff format --check .
	lint-imports --no-cache
	OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

lint: $(MADE)
	ruff check --fix .
	ruff format .

# Real lungs on a CPU: films and CT slices below DATA, an EfficientNet as CHECKPOINT. Three hours on
# two cores; interrupted, it goes on.
real: $(MADE)
	python tools/real.py $(DATA) --checkpoint $(or $(CHECKPOINT),google/efficientnet-b0)

# Runs every command of the documents in a fresh clone.
docs: $(MADE)
	python benchmarks/documents.py

# Speed, side by side with what people use today: about 12 minutes on two cores.
bench: $(MADE)
	python benchmarks/run.py

# The first ten minutes on a new card: every stage on it, then speed, memory and determinism at full
# size, with random weights.
gpu: $(MADE)
	pytest -p no:xdist tests/gpu
	python benchmarks/run.py --only systems training zeroshot

# Other processors, kills, fuzzing, and ten times the study's images: what is too long for a test.
soak: $(MADE)
	python benchmarks/soak.py
	python benchmarks/load.py
