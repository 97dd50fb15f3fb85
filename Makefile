# make serve   install into .venv and serve with the built-in configuration (ARGS="--config FILE" for another)
# make test    everything CI checks: style, types, tests
# Stamps in .venv remember what is installed, so that repeated runs start at once.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.PHONY: help serve test test-full test-transports lint format clean

help:
	@echo "make serve      install into $(VENV) and serve on 127.0.0.1:8980; ARGS=\"--config FILE\" for another configuration"
	@echo "make test       what CI runs: ruff, mypy, pytest; PYTEST_ARGS=\"tests/test_config.py\" for less"
	@echo "make test-full  the same with the longer runs"
	@echo "make test-transports  what talks to a server over the wire, on each transport in turn"
	@echo "make lint       ruff and mypy only"
	@echo "make format     put the code into its format"
	@echo "make clean      remove $(VENV) and everything that was built"

serve: $(VENV)/.installed
	@exec $(BIN)/re-server $(ARGS)

# Tests run on the transport the server chooses, which is the native one; what clients see is shown on grpcio as well.
OTHER_TRANSPORT = EXPBUILD_TEST_TRANSPORT=grpcio $(BIN)/python -m pytest -m "not docker and not one_transport" \
	tests/api tests/execution_api tests/bazel/test_build.py::test_first_build_runs_every_action_remotely

test: lint $(VENV)/.test-deps
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(OTHER_TRANSPORT))

test-full: lint $(VENV)/.test-deps
	PYTHON=$(BIN)/python tests/install-clients
	EXPBUILD_TEST_FULL=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(OTHER_TRANSPORT))

# Every server these start takes the transport from the variable (tests/support/server.py).
test-transports: $(VENV)/.test-deps
	for transport in grpcio native; do \
		EXPBUILD_TEST_TRANSPORT=$$transport $(BIN)/python -m pytest $(wildcard tests/api tests/execution_api tests/bazel) \
			$(PYTEST_ARGS) || exit 1; \
	done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src tests tools $(wildcard benchmarks/*.py)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Debian splits ensurepip off into python3-venv; without it `python3 -m venv` leaves half an environment behind.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "expbuild needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing python3-venv, which $(PYTHON) needs to make a virtual environment" >&2; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends python3-venv; \
		else \
			echo "$(PYTHON) cannot make a virtual environment: run 'apt-get install python3-venv' as root, then try again" >&2; \
			exit 1; \
		fi; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml
	$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# Seconds each; the root file system of bazel-sid takes two minutes and 1.4 GB, and is for `make test-full`.
QUICK_CLIENTS := bazel-2.1.0 moon-2.5.5 buildstream-2.8.1

$(VENV)/.test-deps: $(VENV)/.installed-dev tests/install-deps tests/install-clients
	tests/install-deps
	PYTHON=$(BIN)/python tests/install-clients $(QUICK_CLIENTS)
	@touch $@
