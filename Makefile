# Needs only python3 >= 3.11 with its venv module, and make. Everything else is installed into .venv from requirements.lock
# (and, for `make types` alone, from .ci/types.lock).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES_STAMP := $(VENV)/.types-installed
TYPED := shardkv_client shardkv.errors shardkv.types shardkv.codec shardkv.wire
WORKERS ?= 4

.PHONY: install demo test check unit types lock clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "shardkv needs Python 3.11 or newer; this is $$($(PYTHON) --version). Set PYTHON=python3.12, say." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(BIN)/python -m compileall -q shardkv client placement bench  # else a start compiles them where Python may write no .pyc
	@touch $(STAMP)

demo: install
	@$(BIN)/python -m shardkv.cli.demo

test: check unit

unit: install
	$(BIN)/python -m pytest -n $(WORKERS) -q

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml

# Whether a type checker knows the type of all that a user of the client can name. Says of what does not hold only where
# it begins: a type that is not known makes those unknown that it is a part of.
types: $(TYPES_STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH"; for name in $(TYPED); do \
		if found=$$(basedpyright --verifytypes $$name); then \
			echo "$$name: every type is known"; \
		else \
			own=$$(echo "$$found" | grep ' error: ' | grep -v 'partially unknown'); \
			echo "$${own:-$$found}"; \
			echo "$$name: types are missing" >&2; \
			exit 1; \
		fi; \
	done

$(TYPES_STAMP): $(STAMP) .ci/types.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/types.lock
	@touch $@

# Makes the lock files anew. Needs `uv` on the path.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra bench --group dev pyproject.toml -o requirements.lock
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --group types -o .ci/types.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist
