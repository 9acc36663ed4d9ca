# Two commands do everything on a fresh machine: `make demo` and `make test`.
# They need Python 3.11 or newer, git, bubblewrap, and Node's npm, which brings the sandbox-agent program; the tests
# need PostgreSQL's programs, too, and start a server of their own.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3
DATABASE ?= sqlite
export DATABASE
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo images compose test test-unit test-integration test-faults test-docker test-compose test-compose-faults \
    test-needs check breaking generate generate-check bench format lock clean

setup: $(VENV)/.installed node_modules/.installed sdk/typescript/node_modules/.installed

$(VENV)/.installed: requirements.lock pyproject.toml sdk/python/pyproject.toml agents/scripted/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable . --editable sdk/python --editable agents/scripted
	touch $@

node_modules/.installed: package.json package-lock.json | $(VENV)/.installed
	npm ci --no-audit --no-fund --loglevel=error
	touch $@

sdk/typescript/node_modules/.installed: sdk/typescript/package.json sdk/typescript/package-lock.json
	npm ci --prefix sdk/typescript --no-audit --no-fund --loglevel=error
	touch $@

demo: setup
	$(BIN)/branchline demo

# All tests run on SQLite, and on PostgreSQL with `make test DATABASE=postgresql`, each for itself or in these parts.
# Most of a test is waiting: more run at once than the machine has cores, and those that take longest begin.
test: test-needs setup
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	    tests/faults/test_kills.py tests/integration tests/contract tests/unit

test-unit: test-needs setup
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile tests/unit tests/contract

test-integration: test-needs setup
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile tests/integration

test-faults: test-needs setup
	$(BIN)/pytest -q tests/faults

# Images from this checkout, and all of it up on this machine's Docker Engine: see docs/operating.md.
images:
	deploy/docker/build

compose: setup
	deploy/compose/up

# Docker sandboxes of services on this machine.
test-docker: setup images
	$(BIN)/pytest -q tests/docker

# In real containers: what is built, the main job, one kill, what sandboxes reach; then all that may befall a container.
test-compose: setup
	$(BIN)/pytest -q tests/compose/test_configuration.py tests/compose/test_images.py \
	    tests/compose/test_main_job.py tests/compose/test_isolation.py

test-compose-faults: setup
	$(BIN)/pytest -q -s tests/compose

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
	$(BIN)/buf format --diff --exit-code
	$(MAKE) breaking generate-check
	npm --prefix sdk/typescript run check

# What a release has promised holds: source of the public contract, bytes of the internal one.
breaking: setup
	@release=$$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null) || \
	{ echo "no release yet to break"; exit 0; }; \
	echo "buf breaking --against $$release"; \
	$(BIN)/buf breaking --against "$$(git rev-parse --git-common-dir)#tag=$$release"

# Writes all that comes from the protos into the folder $(1).
define write_generated
	$(BIN)/buf generate --output $(1)
	$(BIN)/buf generate --template buf.gen.internal.yaml --output $(1)
	$(BIN)/buf generate --template buf.gen.typescript.yaml --output $(1)
	$(BIN)/buf build protos/public --as-file-descriptor-set --exclude-imports \
	    --output $(1)/sdk/python/src/branchline/contract.binpb
	$(BIN)/python sdk/python/generate_services.py $(1)/sdk/python/src/branchline
	$(BIN)/ruff format --quiet $(1)/sdk/python/src/branchline/services.py
	$(BIN)/python docs/reference.py $(1)/docs/api < $(1)/sdk/python/src/branchline/contract.binpb
endef

generate: setup
	$(call write_generated,.)

generate-check: setup
	rm -rf build/generated && mkdir -p build/generated
	$(call write_generated,build/generated)
	for part in sdk/python/src/branchline/v1 sdk/python/src/branchline/services.py sdk/python/src/branchline/contract.binpb sdk/python/src/buf stubs \
	    sdk/typescript/src/gen docs/api; do \
	    diff -r -x __pycache__ build/generated/$$part $$part || exit 1; \
	done

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

EXPORT := $(BIN)/uv export --quiet --no-emit-workspace --no-annotate --no-header

# All of it, and what the image takes of it: to run, and to be built.
lock:
	$(EXPORT) --all-groups --output-file requirements.lock
	$(EXPORT) --no-dev --output-file deploy/docker/requirements.lock
	$(EXPORT) --only-group build --output-file deploy/docker/build.lock

clean:
	rm -rf build data node_modules sdk/typescript/node_modules sdk/typescript/dist $(VENV)
