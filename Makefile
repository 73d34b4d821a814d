# make demo    set up, then train a small GPT over 3 processes of this machine and generate from it
# make test    set up, then the whole test suite
# make setup | check | bench | docs | web | mutants | clean

VENV    := .venv
STAMP   := $(VENV)/.smolcluster-installed
ifeq ($(OS),Windows_NT)
BIN     := $(VENV)/Scripts
else
BIN     := $(VENV)/bin
endif
# The newest Python of at least 3.10; override with: make setup PYTHON=/path/to/python
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

.PHONY: setup demo test check bench docs web mutants clean

setup: $(STAMP)

# With a CPU build of torch named by PIP_FIND_LINKS both installers take it, as constraints.txt pins the version.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or newer with venv was found. Install one, or: make PYTHON=/path/to/python"; exit 2; }
	@if command -v uv >/dev/null 2>&1; then \
		echo "setting up $(VENV) with uv"; \
		UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}"; export UV_FIND_LINKS; \
		{ test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV); } && \
		VIRTUAL_ENV=$(VENV) uv pip install --quiet --constraint constraints.txt --editable ".[all,dev]"; \
	else \
		echo "setting up $(VENV) with pip (a few minutes the first time: PyTorch is large)"; \
		{ test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); } && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all,dev]"; \
	fi
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/smolcluster demo

test: $(STAMP)
	@$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@$(BIN)/python benchmarks/world_size_1.py
	@$(BIN)/python benchmarks/all_reduce.py --quick

mutants: $(STAMP)
	@$(BIN)/python tests/mutants/run_mutants.py

docs: $(STAMP)
	@$(BIN)/mkdocs build --strict

web:
	@echo "error: the chat page comes in a later release"; exit 2

clean:
	rm -rf $(VENV) site build dist
