# `make demo` and `make test` do all their own set-up: they need Python >= 3.10, a C++17 compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := CMakeLists.txt setup.py $(shell find csrc -type f)

.PHONY: demo demo-vlm test test-noext test-open-clip test-interpret compile-gates setup bench gpu-check fmt lint type nm asan clean

demo: $(VENV)/.native ## train CLIP on real digits through the fused loss, and measure what it saves
	$(BIN)/vlmfast demo --out demo

demo-vlm: $(VENV)/.native ## a small vision-language model learns to caption and to answer, and shows how well
	$(BIN)/vlmfast demo-vlm --out demo-vlm

test: $(VENV)/.native ## every test
	VLMFAST_REQUIRE=cpu $(BIN)/python -m pytest -n 2

test-noext: $(VENV)/.pinned ## every test as on a machine without a compiler: the reference alone
	VLMFAST_NO_EXT=1 $(BIN)/python -m pytest -n 2

bench: $(VENV)/.native ## every op beside its rivals, under pytest-benchmark
	$(BIN)/python -m pytest benchmarks/ops

gpu-check: ## the tests on this machine's GPU and its benchmarks, with the PyTorch that $(PYTHON) has: no .venv, no network
	PYTHON=$(PYTHON) benchmarks/gpu_check.sh

setup: $(VENV)/.native ## the virtual environment, pinned, with the extension built

$(VENV)/.pinned: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel cmake ninja pybind11
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable '.[test,lint]'
	touch $@

$(VENV)/.native: $(VENV)/.pinned $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

fmt: $(VENV)/.pinned
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h')

lint: $(VENV)/.pinned
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h')

type: $(VENV)/.pinned
	$(BIN)/mypy

nm: $(VENV)/.native ## the objects of an instruction set export nothing that another set's could replace
	$(BIN)/python tests/csrc/check_symbols.py build/temp*

asan: $(VENV)/.pinned ## the kernels' own tests under the address and undefined-behaviour sanitizers
	$(BIN)/cmake -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DVLMFAST_SANITIZE=ON
	$(BIN)/cmake --build build/asan --target vlmfast_test
	build/asan/vlmfast_test

$(VENV)/.triton: $(VENV)/.pinned
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable '.[triton]'
	touch $@

test-interpret: $(VENV)/.native $(VENV)/.triton ## the values and gradients of the Triton kernels, without a GPU
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 VLMFAST_REQUIRE=triton $(BIN)/python -m pytest -n 2 tests/ops tests/bench/test_tune.py -k triton

# torchvision, which open_clip imports, does not load beside the CPU's torch and breaks transformers: it stays out of .venv
# itself. --no-deps: all else that open_clip needs is there.
$(VENV)/.open_clip: $(VENV)/.pinned
	rm -rf $(VENV)/open_clip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/open_clip \
		open_clip_torch==3.3.0 timm==1.0.31 torchvision==0.28.0 webdataset==0.2.86
	touch $@

test-open-clip: $(VENV)/.native $(VENV)/.open_clip ## open_clip's own training loop, losses, models and data beside ours
	VLMFAST_REQUIRE=cpu,open_clip PYTHONPATH=$(VENV)/open_clip OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 \
		-k open_clip tests/integrations/test_open_clip_training.py tests/losses tests/models tests/bench tests/data

compile-gates: $(VENV)/.triton ## the Triton kernels compile for each kind of GPU, spill nothing, use the matrix unit
	$(BIN)/python benchmarks/compile_gates.py

clean:
	rm -rf $(VENV) build vlmfast/*.so vlmfast/_ext_error.txt
