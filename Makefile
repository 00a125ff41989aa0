# Everything starts from a fresh clone: `make demo` or `make test` makes .venv first; a second call finds it ready.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Beside the installed one, the Triton of PyTorch 2.11, which GPU machines have.
TRITON ?= 3.6.0

# Tests that run side by side.
JOBS ?= $(shell nproc 2>/dev/null || echo 1)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench carry gate hub api lint types check clean

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z]+:.*##/ { printf "  make %-6s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12 chooses the interpreter, TORCH=torch==2.11.0 the PyTorch, PYTEST_ARGS='-k norm' the tests,"
	@echo "  JOBS=1 how many of them run side by side"

demo: $(READY)  ## train, probe and draw on a small data set; results in runs/demo
	$(BIN)/soda-engine demo --out runs/demo

test: $(READY)  ## run every test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

bench: $(READY)  ## measure kernels and whole steps on this CPU in under ten minutes; rows in runs/bench
	@mkdir -p runs/bench
	$(BIN)/python -m benchmarks run --suite norm,attention,diffusion,e2e --cases cifar,digits,cifar10-small \
		--modes fwd,fwd+bwd --dtype fp32 --brief --json runs/bench/$$(date -u +%Y-%m-%d-%H%M%S).jsonl

carry: $(READY)  ## gather in carried/ what a GPU machine without network lacks; DATA=DIR takes CIFAR-10 along
	$(BIN)/python -m benchmarks.gpu.carry $(if $(DATA),--data '$(DATA)')

gate: $(READY)  ## compile the kernels with another Triton, TRITON=3.6.0, and check what they become
	@test -d $(VENV)/triton-$(TRITON) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(VENV)/triton-$(TRITON) 'triton==$(TRITON)'
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-$(TRITON) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
		tests/kernels/test_triton_compiles.py tests/kernels/test_attention_compiles.py \
		tests/kernels/test_diffusion_compiles.py -k measured_shapes

hub: $(READY)  ## write the kernels for Hugging Face's kernels package, a repository in dist/hub
	$(BIN)/python -m soda_kernels.integrations.hub --out dist/hub

api: $(READY)  ## write kernels/API.md from the docstrings
	$(BIN)/python kernels/api_reference.py

lint: $(READY)  ## check the style
	$(BIN)/ruff check .

types: $(READY)  ## check the types
	$(BIN)/mypy

check: lint types test  ## all three

clean:  ## remove the environment, builds and caches; keeps runs/
	rm -f kernels/soda_kernels/libsoda_kernels.so kernels/soda_kernels/native_build.txt
	rm -rf $(VENV) build carried dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kernels engine benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# READY holds the TORCH it was made with and is written last: another TORCH, a changed dependency or C++ source, or an
# interrupted install runs pip again. PyTorch comes first, since the native library is built against its headers; it is
# named again with everything else, so that no dependency can bring another one.
ifneq ($(shell cat $(READY) 2>/dev/null),$(TORCH))
.PHONY: $(READY)
endif
$(READY): setup.py pyproject.toml CMakeLists.txt $(wildcard kernels/csrc/*)
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "soda-engine needs Python 3.11 or newer, which '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes the first time, most of them for PyTorch"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' --editable '.[engine,test]'
	@$(BIN)/python -c 'import soda_kernels; print(soda_kernels.native_status())'
	@echo '$(TORCH)' > $@
