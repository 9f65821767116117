# Two commands do everything on a fresh machine with Python 3 and make:
#   make train   virtual environment, install, the main job        (ARGS="--recipe fast" for more)
#   make test    install, tests                               (make fast: those that take a minute or so)
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=
PYTEST_ARGS ?=
# One process per GPU; one on a machine without.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RANKS := $(if $(filter 0,$(GPUS)),1,$(GPUS))

.PHONY: install train test fast coverage faults bench gpu check clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: install
	$(BIN)/accelerate launch --num_processes $(RANKS) $(if $(filter 1,$(RANKS)),,--multi_gpu) --num_machines 1 \
	    --mixed_precision no --dynamo_backend no -m ddp_mnist.train $(ARGS)

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# A minute and a half at most on two cores: something of every module, without whole jobs.
fast: install
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# All tests, with the lines and branches that none of them ran, in whatever process.
coverage: install
	rm -f .coverage .coverage.*
	status=0; $(BIN)/python -m coverage run -m pytest $(PYTEST_ARGS) || status=$$?; \
	    $(BIN)/python -m coverage combine --quiet && $(BIN)/python -m coverage report && exit $$status

# Break the package on purpose, in one place after the other, and see the tests fail; ARGS="fsync dropout" for some.
faults: install
	$(BIN)/python tests/planted.py $(ARGS)

# 25 to 40 minutes on two cores; ARGS="--quick" for two, ARGS="--json FILE" to keep the figures, or a folder.
bench: install
	$(BIN)/python -m ddp_mnist.bench $(ARGS)

# All that a machine with a GPU can show: all tests, the benchmark, kept by device and date, and what was tried there.
gpu: install
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
	    { echo 'torch finds no GPU here.'; exit 2; }
	trap 'exit 130' INT; status=0; $(BIN)/python -m pytest $(PYTEST_ARGS) || status=$$?; \
	    $(BIN)/python -m ddp_mnist.bench --dataset mnist --json docs/benchmarks $(ARGS) || status=$$?; \
	    $(BIN)/python docs/benchmarks/variants_gpu.py || status=$$?; exit $$status

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then \
	    git ls-files '*.sh' .ci/run | xargs shellcheck && echo 'shellcheck: ok'; \
	else echo 'shellcheck is not installed: shell scripts not checked'; fi

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
