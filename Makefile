# One virtual environment, one set of pinned versions; everything else is ordinary pip and pytest.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo demo-qwen lint types test test-slow clean

setup: $(READY)

# Without compilation, which would take a minute or two: of most modules the byte code is never needed, and Python writes that of
# the others when they are first imported. It must be let to: without byte code every process of the suite takes three times as
# long to start.
unexport PYTHONDONTWRITEBYTECODE
# One process writes the byte code that the suite's workers would otherwise all write side by side.
FIRST := import deepspeed, matplotlib.pyplot, llava_keeplora.compare, llava_keeplora.sequence.runner, llava_keeplora.export.run_export
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e '.[test]'
	$(BIN)/python -c "$(FIRST)"
	touch $(READY)

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed scripts/train_seq.py --config demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed scripts/train_seq.py --config demo-llava

demo-qwen: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed scripts/train_seq.py --config demo-qwen

lint: $(READY) types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# mypy finds packages by the names of folders; these links give `eval` and `data_recipes` their installed ones.
types: $(READY)
	mkdir -p build/typed
	ln -sfn ../../llava_keeplora build/typed/llava_keeplora
	ln -sfn ../../eval build/typed/llava_keeplora_eval
	ln -sfn ../../data_recipes build/typed/llava_keeplora_recipes
	$(BIN)/python -m mypy

# As many processes as there are cores, at most four: one more took half as long again, as each imports everything and they
# share the cores' caches; in the files' order, so that the long ones (docs, cli) don't come last.
WORKERS ?= $(shell $(BIN)/python -c "import os; print(min(4, os.cpu_count() or 1))")

test: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

test-slow: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache
