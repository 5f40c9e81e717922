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
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Random calls of the ops under AddressSanitizer and UndefinedBehaviorSanitizer; SEED=1 makes others.
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/ops.py $(or $(CALLS),50000) --seed $(or $(SEED),0) --minutes 15

bench: $(VENV)/.installed
	mkdir -p bench-out
	for name in $(BENCHES); do $(BIN)/foveate bench $$name --out bench-out/$$name.json || exit 1; done

# Other libraries, each in an environment of its own (about 8 GB under ~/.cache/foveate; llama.cpp is compiled: ten
# minutes the first time). One that cannot be made is left out, and the results say so.
bench-peers: $(VENV)/.installed
	-$(BIN)/python -m foveate.bench.peers
	mkdir -p bench-out
	$(BIN)/foveate bench peers --out bench-out/peers.json --plot bench-out/peers.svg
	$(BIN)/foveate bench decode --out bench-out/decode.json
	$(BIN)/foveate bench quality --peers --out bench-out/quality_peers.json
	$(BIN)/foveate bench cache --out bench-out/cache.json

clean:
	rm -rf $(VENV) demo-out bench-out
