# The two commands of the README, and what CI calls. Nothing is done twice: .venv/installed is the marker.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-faults lint install clean

demo: install
	$(BIN)/deepspeed experiments/run.py \
		--strategy token_replacement+kv_concat --config experiments/configs/demo.yaml

# Two processes with a thread each: most tests are Python, and a file's shared runs stay with one of them. They keep
# bytecode, or each of the programs that they start would compile ours anew.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
		$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

test-faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m kills tests/faults

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e ".[dev]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) runs build *.egg-info
