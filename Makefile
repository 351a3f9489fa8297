# make demo    train a ResNet on two ranks, with local and with synchronized batch norm
# make calibration    what recalibrating and mixing statistics are worth to a small network
# make test    the whole test-suite
# make check   formatter, linter, type checker
# Each makes and fills .venv itself; nothing but Python and make is needed.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo calibration test check format clean

demo: $(INSTALLED)
	$(PYTHON) examples/demo.py

calibration: $(INSTALLED)
	$(PYTHON) examples/resnet/calibration_study.py

test: $(INSTALLED)
	$(PYTHON) -m pytest

check: $(INSTALLED)
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	$(PYTHON) -m mypy

format: $(INSTALLED)
	$(PYTHON) -m ruff format
	$(PYTHON) -m ruff check --fix

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
