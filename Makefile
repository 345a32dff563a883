# The main job and the tests; both make the environment they need.
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= demo

.PHONY: demo test check mutants fuzz clean

$(BIN)/.installed: pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[runtime,dev]'
	touch $@

# Profile this machine, plan a small decoder for a "GPU" too small for it, run the plan on real text, compare, go on, export.
demo: $(BIN)/.installed
	rm -rf $(DEMO)/run $(DEMO)/trained
	$(BIN)/planner profile --quick --device cpu --model tiny --seq-len 128 --micro-batch 2 --micro-batch 4 --micro-batch 8 \
	    --name demo-machine -o $(DEMO)/machine.json
	$(BIN)/planner simulate --model tiny --machine $(DEMO)/machine.json --seq-len 128 --global-batch 8 \
	    --gpu-memory 3MiB --verify -o $(DEMO)/plan.json
	$(BIN)/planner show $(DEMO)/plan.json
	$(BIN)/runtime execute $(DEMO)/plan.json --device cpu --steps 40 --lr 2e-3 --save-every 20 -o $(DEMO)/run
	$(BIN)/runtime resume $(DEMO)/run --device cpu --steps 50
	$(BIN)/runtime export $(DEMO)/run -o $(DEMO)/trained
	$(BIN)/planner simulate --model 123b

test: $(BIN)/.installed
	$(BIN)/python -m pytest

# What CI checks beside the tests.
check: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# How many small changes to slideplan/ and simulator/ the tests notice: a random sample, always the same one for the same
# code. Half an hour of one core; settings in pyproject.toml.
mutants: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[runtime,dev,mutants]'
	nice $(BIN)/python benchmarks/mutants.py -o mutants.json

# An hour of one core: broken input to everything that reads. Counts examples, failures and peak memory.
fuzz: $(BIN)/.installed
	nice -n 19 taskset -c 0 $(BIN)/python benchmarks/fuzz.py -o runs/fuzz/fuzz.json

clean:
	rm -rf $(VENV) $(DEMO)
