# The only two commands a newcomer needs are `make demo` and `make test`; each sets up .venv first, once.
PYTHON ?= python3
# Test processes, of one thread each. Whole files go to a process, the longest first.
PROCESSES ?= 2
BIN := .venv/bin
READY := .venv/.ready
PYTEST = $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check format benchmarks imports soak docs

demo: $(READY)
	$(BIN)/prunescope run demo

test: check
	$(PYTEST)

test-all: check
	$(PYTEST) -m "full or not full"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(READY)
	$(BIN)/python -m pytest tests/benchmarks -s

# Draws which part imports which.
imports: $(READY)
	$(BIN)/python -P tests/imports.py docs/figures/imports.svg

# Builds the documentation as a site, .site/index.html; a link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Kills a small study at random moments and looks at what it leaves: make soak KILLS=20 SEED=1
KILLS ?= 5
SEED ?= 0
soak: $(READY)
	PYTHONPATH=.:tests $(BIN)/python tests/soak.py --kills $(KILLS) --seed $(SEED)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up .venv (once, a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,hub,dev]'
	@touch $(READY)
