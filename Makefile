# Two commands on a fresh machine with Python, make and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHES ?= kernels switch load quality

.PHONY: demo test check bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/foveate demo --out demo-out

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: $(VENV)/.installed
	for name in $(BENCHES); do $(BIN)/foveate bench $$name --out bench-out/$$name.json || exit 1; done

clean:
	rm -rf $(VENV) demo-out bench-out
