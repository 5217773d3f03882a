# Everything a newcomer needs: `make demo` (again: `make demo ARGS=--overwrite`), `make test`. Each makes .venv and installs the package on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
# one torch thread: on shared cores two are many times slower than one
TEST_ENV = OMP_NUM_THREADS=1

.PHONY: demo test test-all bench lint clean

demo: $(INSTALLED)
	$(BIN)/autoreid demo --out demo $(ARGS)

# the exported files have a process of their own: one in which OpenVINO has run may crash when it forks, as loaders do
test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow and not gpu" --ignore tests/test_export.py
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow and not gpu" tests/test_export.py

test-all: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest --ignore tests/test_export.py
	$(TEST_ENV) $(BIN)/python -m pytest tests/test_export.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/drawn_difficulty.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the rest into $(VENV): a few minutes"
# compat: a plain path, so that Python run from the clone's parent folder finds the package, not the clone
	$(BIN)/pip install --quiet --editable ".[dev]" --config-settings editable_mode=compat
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
