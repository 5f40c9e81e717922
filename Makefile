# Two commands on a fresh machine with Python, make and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHES ?= kernels switch load quality decode saved

.PHONY: demo test check fuzz bench bench-peers clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/foveate demo --out demo-out

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Hostile and random files, and processes that save to one folder at once; the numbers are those of one long run.
fuzz: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python tests/fuzz/heads.py 100000 2000
	PYTHONPATH=tests $(BIN)/python tests/fuzz/files.py 20000
	PYTHONPATH=tests $(BIN)/python tests/fuzz/saves.py 500

bench: $(VENV)/.installed
	mkdir -p bench-out
	for name in $(BENCHES); do $(BIN)/python -m benchmarks $$name --out bench-out/$$name.json || exit 1; done

# Other libraries, each in an environment of its own (about 8 GB under ~/.cache/foveate; llama.cpp is compiled: ten
# minutes the first time). One that cannot be made is left out, and the results say so.
bench-peers: $(VENV)/.installed
	-$(BIN)/python -m benchmarks.peers
	mkdir -p bench-out
	$(BIN)/python -m benchmarks peers --out bench-out/peers.json --plot bench-out/peers.svg
	for name in decode_peers quality_peers cache; do \
		$(BIN)/python -m benchmarks $$name --out bench-out/$$name.json || exit 1; done

clean:
	rm -rf $(VENV) demo-out bench-out
