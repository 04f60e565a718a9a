# loraplex, one verb each. On the machine: make and Python 3.11 or newer. Everything else goes into .venv, from the lock
# files; each stamp says that one of the two sets is in there, so that the demo does not wait for the tests' oracles.
#
#   PYTHON=python3.12          the Python that makes .venv
#   TORCH_EXTRA_INDEX_URL=...  one more index to find torch in. Without it Linux gets the default index's CUDA build, of
#                              several GB; the PyTorch project's index of CPU wheels has a small one (see Dockerfile).

PYTHON ?= python3
TORCH_EXTRA_INDEX_URL ?=
BENCH ?=
FAULT ?=

BIN := .venv/bin
# Twice quiet: only errors.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -qq

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-all test-optimized test-soak fault coverage openapi docs screenshots check bench pairs growth large-fleets ray databases coherence attacks audit release

help:  ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

setup: .venv/dev.stamp  ## make .venv for the service and the tests; does nothing when it is current

demo: .venv/run.stamp  ## train, upload, predict and crash on real data, in a minute or two
	@$(BIN)/python demo/demo.py

serve: .venv/run.stamp  ## start the service on 127.0.0.1:8000
	@$(BIN)/loraplex serve

# Three at a time, also on two cores: many tests wait for a process. Groups: see tests/conftest.py.
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n 3 --dist loadgroup --no-loadscope-reorder

test: .venv/dev.stamp  ## run the tests but the slow ones, in under five minutes
	@$(PYTEST) $(PARALLEL) -m "not slow and not timing"

# A test that fails beside others counts as failed if it fails alone too. The first failure stays in the output: it is a
# defect of the test or of the product.
test-all: .venv/dev.stamp  ## run all tests, as CI does; those with a bound in seconds run alone at the end
	@$(PYTEST) $(PARALLEL) -m "not timing" || $(PYTEST) --last-failed --last-failed-no-failures none -m "not timing"
	@$(PYTEST) -m timing $$(grep -rl --include=*.py mark.timing tests)

# Child processes inherit the variable. pytest keeps the assertions of test modules, and says that others are gone.
test-optimized: .venv/dev.stamp  ## run the tests of units and of hostile requests under `python -O`
	@PYTHONOPTIMIZE=1 $(PYTEST) $(PARALLEL) -W ignore::pytest.PytestConfigWarning -m "not slow and not timing" \
		tests/unit tests/integration/hostile

test-soak: .venv/dev.stamp  ## run the long forms of the kill tests and of others that draw at random, about an hour
	@CRASH_KILLS=50 TRAINING_KILLS=50 TRAINING_CANCELS=100 FRAMED_STREAMS=10000 METRIC_NAMES=20000 REPLACEMENTS=1000 \
		REVOCATIONS=200 REVOKED_REQUESTS=10000 DUPLICATE_ROUNDS=1000 LARGE_FLEET_TIMES=3 \
		$(PYTEST) -m soak --timeout 7200

# Results add up in build/fault/results.jsonl, so that it can be interrupted. FAULT=--short runs the short form, and
# FAULT="--storage cluster" runs it on PostgreSQL and an S3 server.
fault: .venv/dev.stamp  ## break processes, disks, bits, clocks and inputs until every count of docs/reliability.md is reached, hours
	@$(BIN)/python -m scripts.fault $(FAULT)

# Not those with a bound in seconds: they would measure the coverage tool.
coverage: .venv/dev.stamp  ## run the tests of `make test`, and show the lines that they do not reach; writes build/coverage/html
	@$(PYTEST) $(PARALLEL) -m "not slow and not timing" --cov --cov-report=term --cov-report=html

openapi: .venv/run.stamp  ## write docs/openapi.json, where the API is meant to change
	@$(BIN)/python -m scripts.write_openapi

docs: .venv/dev.stamp  ## build the documentation site into build/site; a broken link fails
	@$(BIN)/python -m scripts.build_docs

# Where there is no Chromium, the tests that take them are skipped, and nothing changes.
screenshots: .venv/dev.stamp  ## take docs/screenshots anew, with Chromium
	@SCREENSHOTS=1 $(BIN)/python -m pytest tests/acceptance/browser/test_views.py

check: .venv/dev.stamp docs  ## ruff, mypy, import contracts, layout, spelling, prose, the Kubernetes manifests, and the documentation site
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/proselint --config .proselintrc.json check README.md CONTRIBUTING.md SECURITY.md client/README.md benchmarks/README.md docs
	$(BIN)/python -m scripts.generate_client --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m scripts.structure
	$(BIN)/python -m scripts.kubernetes

# BENCH=quick is over in a few minutes; BENCH="engine service" runs these sections only.
bench: benchmarks/.venv/run.stamp  ## measure it beside its peers, an hour; writes benchmarks/RESULTS.md
	@command -v wrk >/dev/null || benchmarks/install_wrk.sh
	@benchmarks/.venv/bin/python -m benchmarks $(patsubst quick,--quick,$(BENCH))

pairs: .venv/dev.stamp  ## compare /predict with another commit: make pairs COMMIT=...; writes benchmarks/PAIRS.md
	@command -v wrk >/dev/null || benchmarks/install_wrk.sh
	@$(BIN)/python -m benchmarks.pairs $(COMMIT)

growth: .venv/dev.stamp  ## measure the catalogue with up to a million adapters; writes benchmarks/GROWTH.md
	@$(BIN)/python -m benchmarks.growth

large-fleets: .venv/dev.stamp  ## measure a fleet of three times a trainer's memory; writes benchmarks/LARGE_FLEETS.md
	@$(BIN)/python -m benchmarks.large_fleets

ray: .venv/dev.stamp  ## measure a fleet on a Ray cluster, one node of which is killed; writes benchmarks/RAY.md
	@$(BIN)/python -m benchmarks.ray_fleet

databases: .venv/dev.stamp  ## measure /predict on PostgreSQL beside SQLite; writes benchmarks/DATABASES.md
	@command -v wrk >/dev/null || benchmarks/install_wrk.sh
	@$(BIN)/python -m benchmarks.databases

coherence: .venv/dev.stamp  ## measure how a batch on PostgreSQL sees every change, and the alternatives; writes benchmarks/COHERENCE.md
	@$(BIN)/python -m benchmarks.coherence

attacks: .venv/dev.stamp  ## attack the service and measure what others notice of it; writes benchmarks/ATTACKS.md
	@$(BIN)/python -m benchmarks.attacks

# The advisories come from PyPI, so this needs a network. pip-audit runs from an environment of its own. --strict: without
# it, packages whose advisories cannot be read are left out, and "No known vulnerabilities found" is said of the rest.
audit:  ## look up known vulnerabilities of the locked packages
	@$(PYTHON) -m venv --clear build/audit && build/audit/bin/pip --disable-pip-version-check install -qq pip-audit
	@build/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock

release: .venv/dev.stamp  ## build the wheels, the bill of materials (SBOM) and SHA256SUMS into build/release
	@rm -rf build/release && $(BIN)/python -m scripts.release build/release

# Also made again when the Python that it points to has gone.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "loraplex needs Python 3.11 or newer, and there is no $(PYTHON): install it, or name one with 'make PYTHON=...'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "loraplex needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): name a newer one with 'make PYTHON=...'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) comes without venv: install it (on Debian and Ubuntu the package python3-venv), then run make again." >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv

# A stamp is touched last, so an interrupted install runs again. (ensurepip: for a venv interrupted before it got pip.)
# Both sets are compiled to bytecode here: if Python may not write beside its packages, every process would compile what it
# imports again, such as torch, and of the oracles pandas and scipy.
.venv/run.stamp: requirements.lock pyproject.toml client/pyproject.toml $(BIN)/python
	@echo "setting up .venv to run the service: about a minute the first time (more where torch has to be downloaded)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(INSTALL) $(if $(TORCH_EXTRA_INDEX_URL),--extra-index-url $(TORCH_EXTRA_INDEX_URL)) -r requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@$(INSTALL) --no-deps --no-build-isolation -e client
	@touch $@

.venv/dev.stamp: requirements-dev.lock .venv/run.stamp
	@echo "setting up .venv for the tests and checks: another minute the first time"
	@$(INSTALL) -r requirements-dev.lock
	@touch $@

# The peers, with an environment of their own: the service is measured in the one that it ships with.
benchmarks/.venv/run.stamp: benchmarks/requirements.lock requirements.lock .venv/run.stamp
	@echo "setting up benchmarks/.venv for the peers: three minutes the first time"
	@$(BIN)/python -m venv --clear benchmarks/.venv
	@benchmarks/.venv/bin/python -m pip --disable-pip-version-check install -qq \
		$(if $(TORCH_EXTRA_INDEX_URL),--extra-index-url $(TORCH_EXTRA_INDEX_URL)) -r requirements.lock -r benchmarks/requirements.lock
	@touch $@
