# Each target creates .venv first if it is missing or out of date; a second run installs nothing.
#   make demo    the whole service at work: a server, a trainer and an evaluation worker on real data
#   make test    all tests (ARGS="-k name" is passed on to pytest)
#   make quick   the tests that start no processes and are not slow, in about a minute; property tests take fewer examples
#   make integrations  the tests with real frameworks (transformers, Lightning, ...), after installing those
#   make compat  those of quick on every Python from 3.11 to 3.14 that is found, and on the oldest torch
#   make check   format, lint, types, import contracts       make fix   format and repair what can be repaired
#   make gpu     tests and measures on the CUDA device of this machine, with PYTHON as it is: its torch needs CUDA
#   make gpu-bundle  the wheels that this needs on a machine without network access (ARGS="--python 3.12")
#   make docs    the docs site, in site/                 make bench   the benchmarks
# PYTHON: the interpreter to build .venv from (3.11 or newer).  TORCH: the torch release to install.  VENV: where to.
# WORKERS: tests at a time.

PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   ?= .venv
ARGS   ?=
# Many tests start processes and wait for them: three at a time keep two cores busy.
WORKERS ?= 3

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed-torch-$(TORCH)
INDEX := https://download.pytorch.org/whl/cpu

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pytest keeps the tests as it has rewritten them: to do that again takes it several seconds at each start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test quick integrations compat check fix docs bench gpu gpu-bundle clean

demo: $(STAMP)
	$(BIN)/ema demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not process and not slow" $(ARGS)

integrations: $(VENV)/.installed-integrations
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m integration $(ARGS)

compat:
	scripts/compat.sh

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "built site/index.html"

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

gpu:
	$(PYTHON) scripts/gpu.py $(ARGS)

gpu-bundle: $(BIN)/python
	$(BIN)/python scripts/gpu.py --gather gpu-bundle $(ARGS)

clean:
	rm -rf .venv .venv-compat

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "'$(PYTHON)' has no venv module. Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The group parity is installed without its dependencies, which pip would report as conflicts.
$(VENV)/.installed-integrations: $(STAMP)
	$(BIN)/pip install --quiet --no-warn-conflicts --group integrations 'torch==$(TORCH)'
	@touch $@

$(VENV)/.installed-docs: $(STAMP)
	$(BIN)/pip install --quiet --no-warn-conflicts --group docs
	@touch $@

# The CPU build comes from PyTorch's own index. Where that does not answer within 5 s, the plain index serves.
$(STAMP): pyproject.toml | $(BIN)/python
	@rm -f $(VENV)/.installed-*
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	@echo "installing torch $(TORCH) (a few hundred MB the first time)"
	@$(BIN)/python -c 'import urllib.request as u; u.urlopen("$(INDEX)/torch/", timeout=5)' 2>/dev/null \
	  && $(BIN)/pip install --quiet --index-url $(INDEX) 'torch==$(TORCH)' \
	  || { echo "PyTorch's CPU index did not serve torch $(TORCH); taking it from the plain index"; \
	       $(BIN)/pip install --quiet 'torch==$(TORCH)'; }
	@echo "installing this project and its tools"
	$(BIN)/pip install --quiet --editable '.[demo]' --group dev
	@$(BIN)/pip install --quiet --no-deps --group parity \
	  || echo "without other averaging libraries: the tests that compare with them are skipped"
	@$(BIN)/pip install --quiet --only-binary numba,llvmlite --editable '.[fast]' \
	  || echo "without numba: the tests of the compiled kernel are skipped"
	@touch $@
