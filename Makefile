# Two commands: `make demo` shows the method learning, `make test` checks everything.
# Both do all their own set-up in .venv; nothing but Python >= 3.10 and a C++ compiler is assumed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt dvla_fast/ops/schemas.py $(shell find csrc build_tools -type f)
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Bytecode is made of what is imported, not of everything installed: a minute less.
export PIP_NO_COMPILE := 1

.PHONY: demo test suite sanitize install lint format bench gpu-check clean

demo: $(VENV)/.demo
	$(BIN)/dvla-fast demo

# The sanitizers run beside the suite: each leaves a core idle at times.
test: lint
	$(MAKE) --no-print-directory -j2 suite sanitize

# Threads that wait sleep: with more of them than cores, those that spin keep others from working.
suite sanitize: export OMP_WAIT_POLICY := passive

suite: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10

# The C++ kernels on random problems under the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/.dev
	$(BIN)/python build_tools/sanitize.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: $(VENV)/.dev
	$(BIN)/pytest benchmarks/ --benchmark-only

# Needs a GPU: its tests, its benchmarks and the sanitizers, recorded in benchmarks/results. Without
# a network for .venv: docs/benchmarks.md.
gpu-check: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu_check

install: $(VENV)/.dev

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache dvla_fast/lib dvla_fast/_*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first, so that the extension is compiled against the torch it will run with.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install -q "torch>=2.11" numpy
	touch $@

$(VENV)/.demo: $(SOURCES) | $(VENV)/.torch
	$(BIN)/pip install -q -e '.[train]'
	touch $@

# Warnings are errors in a first build, as in a clean clone. After `make demo` its flags stay: others
# would compile everything again.
$(VENV)/.dev: $(SOURCES) | $(VENV)/.torch
	$(if $(wildcard build/*/CMakeCache.txt),,DVLA_FAST_WERROR=1 )$(BIN)/pip install -q -e '.[dev]'
	touch $@ $(VENV)/.demo
