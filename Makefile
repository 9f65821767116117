# Two commands do everything on a fresh machine with Python 3.11 or newer and make:
#   make train   virtual environment, install, the main job        (ARGS="--recipe fast" for more)
#   make test    virtual environment, install, all tests     (make fast: the quick ones, about a minute in all)
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=
PYTEST_ARGS ?=
# Two files of tests at a time: most jobs wait as much as they compute.
TESTS := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
# One process per GPU, of CUDA_VISIBLE_DEVICES where that is set; one on a machine without.
GPUS := $(shell gpus=$$(nvidia-smi -L 2>/dev/null) || CUDA_VISIBLE_DEVICES=; \
    echo "$${CUDA_VISIBLE_DEVICES-$$gpus}" | tr , '\n' | grep -cE '^(GPU|MIG-| *[0-9])')
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
	$(TESTS) $(PYTEST_ARGS)

# A minute at most on two cores: something of every module, without whole jobs.
fast: install
	$(TESTS) -m "not slow" $(PYTEST_ARGS)

# All tests, with the lines and branches that none of them ran, in whatever process.
coverage: install
	rm -f .coverage .coverage.*
	status=0; $(BIN)/python -m coverage run -m pytest $(PYTEST_ARGS) || status=$$?; \
	    $(BIN)/python -m coverage combine --quiet && $(BIN)/python -m coverage report && exit $$status

# Break the package on purpose, in one place after the other, and see the tests fail; ARGS="flushed dropout" for some.
faults: install
	$(BIN)/python tests/support/planted.py $(ARGS)

# 20 minutes on two cores; ARGS="--quick" for two, ARGS="--rows step,ranks", ARGS="--json FILE" to keep the figures.
bench: install
	$(BIN)/python benchmarks/run.py $(ARGS)

# The tests that need a GPU and the benchmark's rows for one, kept in benchmarks/results: 8 minutes at most.
# BIN=DIR names the bin folder of an environment that has everything but this package; then nothing is installed.
gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: $(if $(findstring command,$(origin BIN)),,install)
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
	    { echo 'torch finds no GPU here.'; exit 2; }
	trap 'exit 130' INT; status=0; $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS) || status=$$?; \
	    $(BIN)/python benchmarks/run.py --rows step,epoch,to-98 --json benchmarks/results $(ARGS) || status=$$?; \
	    exit $$status

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then \
	    git ls-files '*.sh' .ci/run | xargs shellcheck && echo 'shellcheck: ok'; \
	else echo 'shellcheck is not installed: shell scripts not checked'; fi

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
