# Everything happens in .venv, made here with nothing but python3 (3.11 or later) and its pip.
# `make test ARGS='-k embedded -x'` hands ARGS to pytest; PYTHON=python3.13 chooses an interpreter.

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/made-for
CHECKED := $(wildcard bus handlers demo worker.py bench examples tests/typing)

.DEFAULT_GOAL := help
.PHONY: help demo test lint env clean bench bench-quick bench-growth bench-profile bench-own

help: ## Say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## Show the bus at work on a private server: no Redis, no Docker needed
	$(RUN) worker.py --demo

test: $(STAMP) ## Run the tests, on every kind of server found here
	$(RUN) -m pytest -n 5 $(ARGS)

lint: $(STAMP) ## Check format, lint rules and types
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy --strict $(CHECKED)

bench: $(STAMP) .venv-peers/made .venv-repid/made ## Measure beside the peers and the bare loops
	$(RUN) -m bench $(ARGS)

bench-quick: $(STAMP) ## Measure beside the bare loops, in about a minute
	$(RUN) -m bench --quick $(ARGS)

bench-growth: $(STAMP) ## Measure how costs grow, and draw docs/growth.png
	@$(PIP) install --requirement bench/growth.txt
	$(RUN) -m bench growth $(ARGS)

bench-profile: $(STAMP) ## See where the time of our process goes (py-spy)
	@$(PIP) install --requirement bench/profile.txt
	$(RUN) -m bench profile $(ARGS)

bench-own: $(STAMP) ## Measure what effects, looking back, a full stream, observers and events cost
	$(RUN) -m bench own $(ARGS)

env: $(STAMP) ## Make the environment .venv (the other targets do it when needed)

clean: ## Remove the environment, caches and build results
	rm -rf $(VENV) .venv-peers .venv-repid .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The peers have environments of their own: they want other versions than we do, and than each other.
.venv-%/made: bench/%.txt
	@echo "making .venv-$*"
	@$(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

# A clone that was moved or copied brings an environment that points to the old place. So the stamp
# says what place it was made for, and counts only there.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "making $(VENV): half a minute or so the first time"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --constraint constraints.txt --upgrade pip
	@$(PIP) install --constraint constraints.txt --group test --group lint
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[cli,embedded,web]'
	@echo "$(CURDIR)" > $(STAMP)
