# Two commands on a fresh machine with Python, make and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHES ?= kernels switch load quality decode saved
# Processes that share the tests.
WORKERS ?= 2
# For environments that are not pinned: the newest torch of which there is a CPU build at hand.
TORCH ?= torch==2.13.0

.PHONY: demo serve-demo test test-newest test-oldest coverage check pins fuzz bench bench-peers clean

# An environment, and foveate with its development packages in it, under further arguments of pip. What builds foveate is
# installed beside it, since pip would otherwise fetch that into an environment of its own, where no pin holds.
define install
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) hatchling editables
$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) --no-build-isolation -e '.[dev]'
endef

# The kernels are compiled before the tests, so that no two processes do it at once.
define pytest
$(1)/bin/python -c "import foveate; print(foveate.backends())"
$(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(2)
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),-c constraints.txt)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/foveate demo --out demo-out

# Serves the demo's model, which `make demo` trains, and sends it more than it can carry. MODEL=out/ serves another one.
serve-demo: $(VENV)/.installed
	$(BIN)/foveate serve-demo $(MODEL)

test: $(VENV)/.installed
	$(call pytest,$(VENV))

# With the newest releases that there are, and with the oldest of transformers, safetensors, typer and rich that
# pyproject.toml allows: docs/compatibility.md.
test-newest:
	$(call install,.venv-newest,--upgrade --upgrade-strategy eager $(TORCH))
	.venv-newest/bin/python -m pip freeze --all
	$(call pytest,.venv-newest)

test-oldest:
	$(call install,.venv-oldest,$(TORCH) $(shell $(PYTHON) .ci/oldest.py))
	.venv-oldest/bin/python -m pip freeze --all
	$(call pytest,.venv-oldest)

# What the tests run of the package's Python; code that runs in processes which tests start is not counted.
coverage: $(VENV)/.installed
	$(call pytest,$(VENV),--cov=foveate --cov-report=term:skip-covered)

check: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(call pytest,$(VENV))

# constraints.txt anew, from the newest releases that there are.
pins:
	rm -rf .venv-pins
	$(call install,.venv-pins,$(TORCH))
	.venv-pins/bin/python .ci/pins.py constraints.txt

# Hostile and random files, processes that save to one folder at once, and random calls of the ops under sanitizers; the numbers
# are those of one long run. SEED=1 makes other calls.
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/ops.py $(or $(CALLS),50000) --seed $(or $(SEED),0) --minutes 15
	PYTHONPATH=tests $(BIN)/python tests/fuzz/heads.py 100000 2000
	PYTHONPATH=tests $(BIN)/python tests/fuzz/files.py 20000
	PYTHONPATH=tests $(BIN)/python tests/fuzz/saves.py 500

bench: $(VENV)/.installed
	mkdir -p bench-out
	for name in $(BENCHES); do $(BIN)/python -m benchmarks $$name --out bench-out/$$name.json || exit 1; done

# Other libraries, each in an environment of its own (about 9 GB under ~/.cache/foveate; llama.cpp and its fork are
# compiled: half an hour the first time). One that cannot be made is left out, and the results say so.
bench-peers: $(VENV)/.installed
	-$(BIN)/python -m benchmarks.peers
	mkdir -p bench-out
	$(BIN)/python -m benchmarks peers --out bench-out/peers.json --plot bench-out/peers.svg
	$(BIN)/python -m benchmarks equal_quality --out bench-out/equal_quality.json --plot bench-out/equal_quality.svg
	for name in decode_peers quality_peers quantizing_peers cache; do \
		$(BIN)/python -m benchmarks $$name --out bench-out/$$name.json || exit 1; done

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-pins demo-out bench-out
