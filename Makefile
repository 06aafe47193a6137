# Two commands do the main jobs, each with all its own set-up: make quickstart, make test. The slow tests are apart.
VENV ?= .venv
PYTHON ?= python3
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin
# What brings the accelerator to JAX, an extra of setup.py: cuda, cuda12 or tpu.
ACCELERATOR ?= cuda
BENCH ?=
# One that ends within a test is not replaced: the run could wait for ever.
PYTEST := $(BIN)/python -m pytest -n 2 --max-worker-restart=0
export NO_MKDOCS_2_WARNING := 1
# Where programs are looked for if the environment does not say.
export PATH ?= /usr/local/bin:/usr/bin:/bin

.PHONY: quickstart test slow lint docs tutorials links bench-gpu clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m fedexp.main --gin_file=quickstart.gin --workdir=$(WORKDIR)

test: $(VENV)/.tested
	$(PYTEST) --dist loadfile -m 'not slow'

slow: $(VENV)/.tested
	$(PYTEST) --dist loadfile -m slow

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.documented
	$(BIN)/mkdocs build --strict --site-dir site

# Runs them, as the slow tests do, and builds the site with what they print and draw.
tutorials: $(VENV)/.tested
	$(PYTEST) tests/test_tutorials.py
	$(MAKE) docs

# Those that lead out of the site; it needs the network.
links: docs
	$(BIN)/linkchecker --check-extern site/index.html

# Ten minutes on a GPU or TPU, and one file to send; BENCH has further options.
bench-gpu: $(VENV)/.$(ACCELERATOR)
	$(BIN)/python -m benchmarks.gpu $(BENCH)

$(VENV)/.installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedexp needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/.linted: $(VENV)/.tested
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

$(VENV)/.cuda $(VENV)/.cuda12 $(VENV)/.tpu: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(patsubst .%,%,$(notdir $@))]'
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
