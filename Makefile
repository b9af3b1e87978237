# Every target makes its own virtual environment when there is none. PYTHON picks the interpreter that builds it.
PYTHON ?= python3
VENV ?= .venv
# What is trained by quickstart and control: miniature, a UNet, or miniature-dit, a transformer.
BASE ?= miniature
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: quickstart control test test-slow lint docs axe screenshots clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: $(READY)
	$(BIN)/ether-diffusion quickstart --base $(BASE) --output_dir out/quickstart --overwrite_output_dir

control: $(READY)
	$(BIN)/ether-diffusion quickstart --control --base $(BASE) --output_dir out/control --overwrite_output_dir

test: $(READY) lint
	$(PYTEST)

$(READY)-slow: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,quantized]"
	touch $@

test-slow: $(READY)-slow
	$(PYTEST) -m slow

# Accessibility rules for the tests of the page, which are skipped without them; needs npm.
axe:
	npm install --silent --no-fund --no-audit --prefix $(VENV)/axe axe-core

screenshots: $(READY)
	$(BIN)/python tools/screenshots.py --output_dir out/screenshots --docs docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

docs: $(READY)
	$(BIN)/python tools/flag_table.py > docs/training-flags.md

clean:
	rm -rf $(VENV) out build *.egg-info
