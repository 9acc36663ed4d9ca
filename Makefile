# Two commands do everything on a fresh machine: `make demo` and `make test`.
# They need Python 3.11 or newer, git, bubblewrap, and Node's npm, which brings the sandbox-agent program; the tests
# need PostgreSQL's programs, too, and start a server of their own.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test test-faults test-needs check breaking generate generate-check bench format lock clean

setup: $(VENV)/.installed node_modules/.installed

$(VENV)/.installed: requirements.lock pyproject.toml sdk/python/pyproject.toml agents/scripted/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable . --editable sdk/python --editable agents/scripted
	touch $@

node_modules/.installed: package.json package-lock.json | $(VENV)/.installed
	npm ci --no-audit --no-fund --loglevel=error
	touch $@

demo: setup
	$(BIN)/branchline demo

test: test-needs setup
	$(BIN)/pytest -q tests/unit tests/contract tests/integration tests/faults/test_kills.py

test-faults: test-needs setup
	$(BIN)/pytest -q tests/faults

test-needs:
	@command -v bwrap >/dev/null || { echo "the tests need bubblewrap (Debian: apt-get install bubblewrap)" >&2; exit 1; }

bench: setup
	$(BIN)/python -m tests.bench

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code protos
	$(MAKE) breaking generate-check

breaking: setup
	@release=$$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null) || \
	{ echo "no release yet to break"; exit 0; }; \
	echo "buf breaking --against $$release"; \
	$(BIN)/buf breaking --against "$$(git rev-parse --git-common-dir)#tag=$$release"

generate: setup
	$(BIN)/buf generate
	$(BIN)/buf generate --template buf.gen.internal.yaml

generate-check: setup
	rm -rf build/generated && mkdir -p build/generated
	$(BIN)/buf generate --output build/generated 2>/dev/null
	$(BIN)/buf generate --template buf.gen.internal.yaml --output build/generated 2>/dev/null
	diff -r -x __pycache__ -x client.py -x __init__.py -x py.typed build/generated/sdk/python/src sdk/python/src
	diff -r -x __pycache__ build/generated/stubs stubs

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write protos

lock:
	$(BIN)/uv export --quiet --all-groups --no-emit-workspace --no-annotate --no-header --output-file requirements.lock

clean:
	rm -rf build data node_modules $(VENV)
