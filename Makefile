# `make demo` and `make test` work on a fresh machine: each makes the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
READY = $(VENV)/.ready

.PHONY: demo test lint bench aot clean

demo: $(READY)
	$(VENV)/bin/sapo score --compare

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

aot: $(READY)
	$(VENV)/bin/python -m tests.aot

bench: $(READY)
	$(VENV)/bin/python -m benchmarks.end_to_end

# torch first and by its pin: a later package must not choose another build of it. The marker is written last, so an
# interrupted installation is done again.
$(READY): .ci/constraints.txt pyproject.toml setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c .ci/constraints.txt torch numpy setuptools wheel
	$(PIP) install -q -c .ci/constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
