# Sluicegate on a fresh machine: Python 3.11 or later, make, and the package registries.
#
#   make run     the gateway on a Postgres of its own, with partners on this machine, and something happening
#   make test    everything: style, types, the direction of imports, and the tests on a real Postgres
#   make bench   the figures, each as a ratio to a limit taken in the same run (ALL=1 ONLY=name ROUNDS=n DOCS=1)
#   make chaos   everything that can go wrong, made to go wrong: nothing may be lost (ONLY=7 SEED=3 ROUNDS=2)
#   make fuzz    100,000 requests that were tampered with, against the program itself (REQUESTS=n SEED=3)

PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
export PATH := $(or $(PATH),/usr/local/bin:/usr/bin:/bin)
UV_VERSION := 0.13.9
TOOLS := .tools
UV := $(TOOLS)/bin/uv
BIN := .venv/bin
export UV_PROJECT_ENVIRONMENT := .venv
export UV_COMPILE_BYTECODE := 1
export UV_PYTHON_DOWNLOADS := never
export UV_SYSTEM_CERTS := true

.PHONY: run test lint types bench chaos fuzz build clean
.DEFAULT_GOAL := run

run: .venv/ready
	@$(BIN)/sluicegate demo

test: lint types
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/ready
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m benchmarks $(if $(ONLY),--only '$(ONLY)') $(if $(ALL),--all) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(DOCS),--docs)

chaos: .venv/ready
	@status=0; \
	$(BIN)/python -m chaos $(if $(ONLY),--only "$(ONLY)") $(if $(SEED),--seed $(SEED)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(DOCS),--docs) || status=$$?; \
	$(if $(ONLY),,HYPOTHESIS_PROFILE=deep $(BIN)/pytest -q tests/test_outbox_model.py || status=$$?;) \
	exit $$status

fuzz: .venv/ready
	@FUZZ_REQUESTS=$(or $(REQUESTS),100000) FUZZ_SEED=$(or $(SEED),1) $(BIN)/pytest -q -s tests/test_fuzz.py

build: .venv/ready
	$(UV) build --quiet --wheel --out-dir dist

.venv/ready: pyproject.toml uv.lock $(UV)
	@$(UV) sync --quiet --locked --all-extras --python $(PYTHON)
	@touch $@

$(UV):
	@test -n "$(PYTHON)" || { echo "Sluicegate needs Python 3.11 or later; none was found. Install one, or say make PYTHON=/path/to/python3." >&2; exit 1; }
	@echo "Setting up: the first time takes up to a minute."
	@$(PYTHON) -m venv $(TOOLS) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

clean:
	rm -rf .venv $(TOOLS) dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
