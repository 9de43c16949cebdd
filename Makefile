# One command per habit. PYTHON chooses the interpreter, 3.10 to 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests wait for servers as often as they compute: two processes a processor are the quickest.
PROCESSES ?= 4
# Of the measurements: full takes twenty minutes, small two.
SIZE ?= full
# Of the slow cases of each test: which share runs, NUMBER/COUNT; today's of three, 0/1 for all.
SHARE ?= $(shell expr $$(date +%s) / 86400 % 3)/3
# Of the fuzz: number of files; SEED repeats a run.
COUNT ?= 20000
# Of the power failures: number of states of Storage, and of loads; SEED repeats a run.
STATES ?= 10000
LOADS ?= 10
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
# What is tested in the project of an app as well, and the share of it that `test-slow` runs.
APP_TESTS := $(wildcard $(patsubst %,tests/test_%*.py,annotations changed concurrency held identity in_use kill load looks model readers \
	report reset verify))
APP_SHARE := tests/test_model.py tests/test_readers.py tests/test_reset_versions.py tests/test_annotations_of_others.py

# The tests start hundreds of interpreters, which compile the modules once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-app test-system check docs bench fuzz power clean

demo: $(DEMO_STAMP)
	@BIN=$(BIN) sh docs/demo.sh

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not system" --numprocesses $(PROCESSES) --maxschedchunk 1

# Sweeps: a kill between any two writes, any sequence of commands, every question of the benchmark.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not system" --share $(SHARE) --numprocesses $(PROCESSES) --maxschedchunk 1
	$(BIN)/python -m pytest --project app --numprocesses $(PROCESSES) --maxschedchunk 1 $(APP_SHARE)

# What loads and resets, in the project of an app with trays and work of its own; `test-slow` has a share of it.
test-app: $(STAMP)
	$(BIN)/python -m pytest --project app -m "not system" --numprocesses $(PROCESSES) --maxschedchunk 1 $(APP_TESTS)

# Installs Debian's packages as root, and the Supabase CLI from npm; they have no tests of their own without them.
test-system: $(STAMP)
	sh tests/system/install.sh $(VENV)/supabase
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile tests/system

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.audit

docs: $(STAMP)
	$(BIN)/python docs/commands.py
	$(BIN)/python docs/database.py
	$(BIN)/python -m tests.nights
	$(BIN)/python -m tests.power.syncs
	$(BIN)/python docs/habits.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks --$(SIZE)

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --count $(COUNT) $(if $(SEED),--seed $(SEED))

power: $(STAMP)
	$(BIN)/python -m tests.power --states $(STATES) --loads $(LOADS) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) .pipeline build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# What the demo needs is part of what the tests need: with those installed, nothing is left to do for it.
$(STAMP): REQUIRED = -e '.[dev]'
$(STAMP): WHAT = the pipeline and its tools with pip, about a minute
$(DEMO_STAMP): REQUIRED = -e '.[all]'
$(DEMO_STAMP): WHAT = the pipeline with pip, about half a minute

$(STAMP) $(DEMO_STAMP): requirements.txt requirements-dev.txt setup.py
	@echo "Installation, step 1 of 3: check the version of $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "Python 3.10 to 3.13 is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=python3.12")'
	@echo "Installation, step 2 of 3: create the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "Installation, step 3 of 3: install $(WHAT)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(REQUIRED)
	@touch $@ $(DEMO_STAMP)
	@echo "Installed in $(VENV); it is not installed again until the requirements change"
