# make demo: train a Mixer on digits, from nothing but Python. make test: all that needs no PyTorch.
# make test-baselines: comparisons with PyTorch and timm. CI runs both tests.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TPU := $(VENV)/.tpu
BASELINES := $(VENV)/.baselines

.PHONY: demo test test-baselines lint clean

$(INSTALLED): requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"error: Python {v.major}.{v.minor} is not supported; pass PYTHON=python3.11, 3.12 or 3.13")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the packages of requirements.txt into $(VENV): a few minutes"
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

demo: $(INSTALLED)
	$(RUN) -m mixer_jax.main --config=configs/digits.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The TPU compiler, which needs no TPU; requirements-tpu.txt is empty where it does not exist.
$(TPU): $(INSTALLED) requirements-tpu.txt
	@echo "installing the packages of requirements-tpu.txt into $(VENV)"
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements-tpu.txt
	@touch $@

test: lint $(TPU)
	$(RUN) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# Where PyTorch cannot be installed, there is nothing to compare with, which is no failure of ours.
test-baselines: $(INSTALLED)
	@if [ $(BASELINES) -nt requirements-baselines.txt ] || { \
	  echo "installing the packages of requirements-baselines.txt into $(VENV): a few minutes"; \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements-baselines.txt \
	    && touch $(BASELINES); }; \
	then $(RUN) -m pytest -m baselines --numprocesses=2 --dist=worksteal; \
	else echo "NOT TESTED against PyTorch and timm: pip could not install them (see above)"; \
	fi

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
