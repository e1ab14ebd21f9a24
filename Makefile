# Every target but help sets the environment up first; that is done once, and again when pyproject.toml or
# constraints.txt change.
#
#   ARGS    what to hand on: make test ARGS="-k width", make train ARGS="--optimization.epochs 2"
#   PYTHON  the interpreter that .venv is made with; default: the first of those below that is fit
#   QUIET   pip is silent but for errors; it tells all it does with QUIET=
#   EXTRAS  what to install besides the package; with CUDA 13, before .venv exists: make setup EXTRAS=dev,dali-cuda13

ARGS ?=
EXTRAS ?= dev,dali-cuda12
QUIET ?= -qq
fit := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	if $$python -c '$(fit)' 2>/dev/null; then echo $$python; break; fi; done)

bin := .venv/bin
installed := .venv/.installed
pip := $(bin)/python -m pip install --disable-pip-version-check -c constraints.txt
explain := { echo "pip could not install this; make setup QUIET= tells what it tried." >&2; exit 1; }

.PHONY: help setup train test check bench soak
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r target what; do \
		printf 'make %-7s %s\n' "$$target" "$$what"; done

setup: $(installed) ## Make .venv and install everything into it
	@echo "Ready: the environment is in .venv"

train: $(installed) ## Generate the sample images, train a small US-Net on them, print its spectrum
	$(bin)/python data/generate_sample.py sample
	$(bin)/python recipes/usnet_sample.py $(ARGS)

test: $(installed) ## Run the tests, except those that take minutes
	$(bin)/pytest $(ARGS)

check: $(installed) ## Lint, check the format, the types and who imports whom
	@echo "== ruff check: lint"
	@$(bin)/ruff check
	@echo "== ruff format: layout (mend it with .venv/bin/ruff format)"
	@$(bin)/ruff format --check
	@echo "== mypy: types"
	@$(bin)/mypy
	@echo "== lint-imports: who may import whom"
	@$(bin)/lint-imports --no-logo

bench: $(installed) ## Generate the sample images, run every benchmark in turn; each compares two sides and prints a ratio
	$(bin)/python data/generate_sample.py sample
	@for script in $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py))); do \
		echo "== $$script"; $(bin)/python "$$script" $(ARGS) || exit; done

soak: $(installed) ## Run the tests that take minutes
	$(bin)/pytest -m soak $(ARGS)

# torch and torchvision come first and in one call, so that pip chooses them for each other.
$(installed): pyproject.toml constraints.txt
	@if ! $(bin)/python -m pip --version >/dev/null 2>&1; then \
		if ! '$(PYTHON)' -c '$(fit)' 2>/dev/null; then \
			echo "No Python 3.11 or newer that can make environments was found:" \
				"install one (Debian, Ubuntu: apt-get install python3 python3-venv)" \
				"or name one, make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3." >&2; \
			exit 2; \
		fi; \
		echo "Making .venv with $$('$(PYTHON)' --version)"; \
		'$(PYTHON)' -m venv --clear .venv; \
	fi
	@echo "Installing torch and torchvision: silent, and long on a slow connection"
	@$(pip) $(QUIET) torch torchvision || $(explain)
	@echo "Installing pliant[$(EXTRAS)] and what it needs"
	@$(pip) $(QUIET) -e '.[$(EXTRAS)]' || $(explain)
	@$(bin)/python -c "from pliant.torchvision_cpu import main; main()"
	@touch $@
