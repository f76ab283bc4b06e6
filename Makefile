# make demo    trains a Mixer on digits, from nothing but Python; installs requirements.txt
# make test    lint, types and every test that is not slow
# make test-slow, make test-baselines    whole runs and TPU compilation; comparisons with PyTorch
# make docs    builds the documentation site in site/
# make audit    looks up known vulnerabilities of dependencies
# make test-all    the three test targets above; CI runs them, make docs and make audit
# make format    formats the code and fixes what ruff can fix
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TESTS := $(VENV)/.tests
DOCS := $(VENV)/.docs
BASELINES := $(VENV)/.baselines
PYTEST := $(RUN) -m pytest --numprocesses=2

.PHONY: demo test test-slow test-baselines test-all docs audit lint format clean

# Python compiles modules when they are imported: 3 s for the demo, instead of 20 s for all of them.
$(INSTALLED): requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 15) else f"error: Python must be 3.11 to 3.14, got {v.major}.{v.minor}. Pass PYTHON=python3.12.")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing requirements.txt into $(VENV) downloads 330 MB and takes a few minutes."
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.txt
	@touch $@

demo: $(INSTALLED)
	$(RUN) -m mixer_jax.main --config=configs/digits.py

# What the tests need in addition: TensorFlow, to compare with it, the TPU compiler, which needs no
# TPU, and jax2onnx. requirements-tpu.txt is empty on platforms without it. requirements-onnx.txt says
# why its packages are installed without dependencies.
$(TESTS): $(INSTALLED) requirements-test.txt requirements-tpu.txt requirements-onnx.txt
	$(RUN) -c 'import sys; v = sys.version_info; sys.exit(None if v < (3, 14) else f"error: Python must be 3.11 to 3.13 for tests, got {v.major}.{v.minor}: TensorFlow has no wheel for it. Run make clean, and pass PYTHON=python3.12.")'
	@echo "Installing requirements-test.txt and requirements-tpu.txt into $(VENV) takes a few minutes."
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements-test.txt \
	  --requirement requirements-tpu.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-onnx.txt
	@touch $@

# What bandit calls low are asserts, imports and subprocesses without a shell.
lint: $(TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/bandit --quiet --recursive --severity-level=medium mixer_jax configs docs launch setup.py

format: $(TESTS)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: lint
	$(PYTEST) --dist=loadfile --no-loadscope-reorder -m "not slow and not baselines"

test-slow: $(TESTS)
	$(PYTEST) --dist=loadfile --no-loadscope-reorder -m "slow and not baselines"

# Skipped with a notice where PyTorch cannot be installed.
test-baselines: $(TESTS)
	@if [ $(BASELINES) -nt requirements-baselines.txt ] || { \
	  echo "Installing requirements-baselines.txt into $(VENV) takes a few minutes."; \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements-baselines.txt \
	    && touch $(BASELINES); }; \
	then $(PYTEST) --dist=worksteal -m baselines; \
	else echo "NOT TESTED against PyTorch and timm: pip could not install them (see above)."; \
	fi

# Fails on links that lead nowhere.
$(DOCS): $(INSTALLED) requirements-docs.txt
	@echo "Installing requirements-docs.txt into $(VENV) takes less than a minute."
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.txt
	@touch $@

# The variable silences a notice of the theme about its successor.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# A notice where the database of vulnerabilities cannot be reached.
audit: $(TESTS)
	@$(RUN) -m tests.audit

test-all: test test-slow test-baselines

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
