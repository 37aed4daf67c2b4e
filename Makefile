# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own virtual environment in .venv.
PYTHON ?= python3
# PyTorch goes in first and by exact version, so that nothing installed after it can bring another one.
TORCH ?= torch==2.13.0
# The Triton whose code benchmarks/results/aot.json describes. A PyTorch with CUDA brings its own: `make test TRITON=triton`.
TRITON ?= triton<3.8
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported; pip, with --no-compile, does not compile all the rest, which takes it longer than to unpack.
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt moda_kernels/_version.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test test-other-torch test-oldest lint docs bench soak gpu clean
.DELETE_ON_ERROR:

# An earlier demo in demo/ is replaced, once the new one is whole.
demo: $(VENV)/installed
	$(BIN)/moda demo --force

test: $(VENV)/installed-dev
	$(MAKE) --no-print-directory -j 2 lint pytest

.PHONY: pytest
pytest: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2

# The same tests with another PyTorch: `make test-other-torch OTHER_TORCH="torch==2.11.0 torchvision==0.26.0"`. Downloads
# gigabytes: PyPI's builds for Linux bring CUDA. NumPy is held back for the interpreter of the Triton that comes with 2.8.
OTHER_TORCH ?= torch==2.8.0 torchvision==0.23.0
OTHER := $(VENV)/other/bin/python
test-other-torch: $(VENV)/installed-dev
	$(PYTHON) -m venv $(VENV)/other
	$(OTHER) -m pip install --quiet $(OTHER_TORCH) "numpy<2.3"
	$(OTHER) -m pip install --quiet --editable ".[train,export,zoo]" timm==1.0.31 hypothesis pillow pyarrow pytest \
	    pytest-benchmark pytest-timeout pytest-xdist selenium setuptools pybind11 cmake ninja build
	$(OTHER) -m pytest -n 2

# The tests of files, runs and commands with the oldest packages that pyproject.toml allows (requirements/oldest.txt).
OLDEST := $(VENV)/oldest/bin/python
test-oldest: $(VENV)/installed-dev
	$(PYTHON) -m venv $(VENV)/oldest
	$(OLDEST) -m pip install --quiet "$(TORCH)" "numpy==1.26.0"
	$(OLDEST) -m pip install --quiet --constraint requirements/oldest.txt --editable ".[train]" pillow pytest pytest-timeout
	$(OLDEST) -m pytest tests/moda/cli tests/moda/runs tests/moda/training/test_training.py tests/moda/test_hostile_files.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/: pages, and a reference made of the docstrings. A broken link is an error. The environment is that of
# `make demo` with the tools of the extra `docs`; no network is needed to build or to read it.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

# Measures this machine, notes it in benchmarks/results/ (in the place of what was measured before) and makes docs/benchmarks.md anew; the table comes last.
bench: $(VENV)/installed-dev
	$(BIN)/moda bench --force
	$(BIN)/python -m benchmarks.render

# Breaks files, trainings and inputs by what the tests do, ten times as often; one table comes last. Takes half an hour.
soak: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.soak

# On a machine with an NVIDIA GPU, network or not, with the PyTorch and Triton that $(PYTHON) has: builds, runs the tests
# marked gpu, compute-sanitizer and the benchmarks; a short table comes last.
gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist demo site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f moda_kernels/_native*.so

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile "$(TORCH)" numpy
	touch $@

# The native extension is built here; without a compiler the package installs all the same and says so.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP) install --quiet --no-compile --editable ".[train]"
	touch $@

# The models of torchvision and timm are test subjects. They go beside the environment, where only the tests look:
# torchvision's wheel does not fit a CPU build of PyTorch (tests/conftest.py), and neither may bring another PyTorch. What
# timm needs besides comes with transformers.
$(VENV)/installed-dev: $(VENV)/torch $(SOURCES)
	$(PIP) install --quiet --no-compile --editable ".[train,dev]" "$(TRITON)"
	$(PIP) install --quiet --no-compile --no-deps --upgrade --target $(VENV)/vision torchvision==0.28.0 timm==1.0.31
	touch $(VENV)/installed $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) install --quiet --editable ".[train,docs]"
	touch $@
