# make help lists the targets. Needs python3 (3.10 or newer), make and, for the fused CPU kernel, g++.
PYTHON ?= python3
VENV ?= .venv
# torch goes first and by exact version: a looser request may fetch gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

BIN := $(VENV)/bin
# Modules are compiled when they are first imported, which most never are.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
unexport PYTHONDONTWRITEBYTECODE# or each process compiles torch anew: a start takes 7 seconds instead of 2
READY := $(VENV)/.at_fused-ready# made by a complete, ordinary install only: anything less is tried again
TOOLS := $(VENV)/.tools-ready
PARALLEL := -q -n auto --benchmark-disable --dist# and how to share the tests
CODE := at_fused models trainer train.py benchmarks reproduce examples
INPUTS := pyproject.toml setup.py at_fused/__init__.py models/torchvision_compat.py $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup test demo mini docs wheel lint bench gpu sanitize soak clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo "choose another torch: make setup TORCH='torch==2.13.0 torchvision==0.28.0 --index-url https://download.pytorch.org/whl/cpu'"

setup: $(READY) ## make .venv, install what is needed, build the kernel

$(BIN)/python:
	@echo "[setup] $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "at_fused needs Python 3.10 or newer: make setup PYTHON=python3.x")'
	@$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python*; echo "[setup] no venv: apt install python3-venv"; exit 1; }

$(READY): $(INPUTS) | $(BIN)/python
	@echo "[setup] $(TORCH)"
	@$(INSTALL) -qq $(TORCH)
	@echo "[setup] $(TORCHVISION), build tools"
	@$(INSTALL) -qq $(TORCHVISION) 'setuptools>=77' wheel ninja
	@echo "[setup] at_fused"
	@$(INSTALL) -v --no-build-isolation -e '.[train]' > $(VENV)/install.log 2>&1 \
		|| { tail -n 30 $(VENV)/install.log; echo "[setup] failed; the whole log: $(VENV)/install.log"; exit 1; }
	@sed -n 's/^ *\(at_fused: .*\)/[setup] \1/p' $(VENV)/install.log
	@line=$$($(BIN)/python models/torchvision_compat.py) && { test -z "$$line" || echo "[setup] $$line"; }
	@grep -q 'at_fused: installing without' $(VENV)/install.log || touch $@

$(TOOLS): pyproject.toml | $(READY)
	@echo "[setup] tools for tests, examples and documentation"
	@$(INSTALL) -qq --no-build-isolation -e '.[train,dev,examples,docs]'
	@touch $@

# The suite's tests of the Triton backend, whose interpreter, once asked for, serves every CPU tensor.
INTERPRETED := $(patsubst %,tests/library/test_%.py,\
	attention_map attention_loss gradient_addend compositions properties) \
	-k 'triton or test_properties'

# A file's tests share what they train: all of them go to one process.
test: $(READY) $(TOOLS) ## run every test
	@echo "[test] pytest"
	@$(BIN)/python -m pytest $(PARALLEL) loadfile
	@if $(BIN)/python -c 'import triton' 2> /dev/null; then \
		echo "[test] pytest in Triton's interpreter"; \
		TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) worksteal $(INTERPRETED); fi

demo: setup ## train a teacher, a student and a student with attention transfer on digits
	@$(BIN)/python -m reproduce.demo

DATA ?=
mini: $(if $(DATA),setup) ## Tables 4 and 5 in minutes on any folder of images: make mini DATA=FOLDER_WITH_train_AND_val
	@test -n "$(DATA)" || { echo "[mini] which images? make mini DATA=FOLDER_WITH_train_AND_val"; exit 2; }
	@$(BIN)/python -m reproduce.mini --data-dir "$(DATA)" --out runs/mini

docs: $(READY) $(TOOLS) ## build the guide and the API reference into build/site, and check them
	@$(BIN)/python -m trainer.keys docs/keys.md
	@$(BIN)/zensical build --strict --clean
	@$(BIN)/python -m pytest -q tests/docs/test_docs.py

# No compiler is on the PATH of the smoke test, and nothing of this checkout.
wheel: $(READY) $(TOOLS) ## build a wheel into dist, install it in a clean environment, try it without a compiler
	@echo "[wheel] build" && rm -rf dist build/wheel
	@AT_FUSED_REQUIRE_EXTENSION=1 $(BIN)/python -m build --wheel --no-isolation > $(VENV)/wheel.log 2>&1 \
		|| { tail -n 30 $(VENV)/wheel.log; exit 1; }
	@echo "[wheel] install, with $(TORCH)" && $(PYTHON) -m venv build/wheel
	@build/wheel/bin/python -m pip --disable-pip-version-check install -qq --no-compile $(TORCH) numpy matplotlib
	@build/wheel/bin/python -m pip --disable-pip-version-check install -qq --no-compile dist/*.whl
	@echo "[wheel] smoke test"
	@cp tests/packaging/smoke.py build/wheel && cd build/wheel && env -i HOME="$$HOME" PATH=bin bin/python smoke.py
	@ls dist/*.whl

lint: $(READY) $(TOOLS) ## ruff and mypy
	@echo "[lint] ruff check" && $(BIN)/ruff check --quiet .
	@echo "[lint] ruff format" && $(BIN)/ruff format --check --quiet .
	@echo "[lint] mypy" && $(BIN)/mypy --no-error-summary $(CODE)

bench: setup ## time the loss and the training step against eager and torch.compile
	@$(BIN)/python -m benchmarks --device cpu --suite loss --out runs/bench
	@$(BIN)/python -m benchmarks --device cpu --suite memory --out runs/bench
	@$(BIN)/python -m benchmarks --device cpu --suite step --out runs/bench

# Installs nothing: the Python given must have what is needed, e.g. make gpu RESULTS=runs/gpu PYTHON=.venv/bin/python
RESULTS ?= runs/gpu
BUDGET_S ?=
CIFAR ?=
ARCHIVE ?=
WHEELS ?=
gpu: ## measure and test on a GPU, in pieces; again to go on: make gpu RESULTS=DIR BUDGET_S=560
	@$(PYTHON) -c 'import torch' 2> /dev/null || { echo "[gpu] $(PYTHON) has no torch: make gpu PYTHON=..."; exit 1; }
	@$(PYTHON) -m benchmarks.gpu --results "$(RESULTS)" \
		$(if $(BUDGET_S),--budget $(BUDGET_S)) $(if $(CIFAR),--cifar "$(CIFAR)") \
		$(if $(ARCHIVE),--archive "$(ARCHIVE)") $(if $(WHEELS),--wheels "$(WHEELS)")

# The sanitized package is in a folder of its own; pytest (unlike python -m pytest) imports it from there.
SANITIZED := build/sanitized
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))
sanitize: $(READY) $(TOOLS) ## run the library's tests on a build with AddressSanitizer and UBSan
	@echo "[sanitize] build"
	@rm -rf $(SANITIZED)
	@AT_FUSED_SANITIZE=address,undefined AT_FUSED_REQUIRE_EXTENSION=1 \
		$(INSTALL) -qq --no-deps --no-build-isolation --target $(SANITIZED) .
	@echo "[sanitize] pytest"
	@PYTHONPATH=$(SANITIZED) LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/pytest $(PARALLEL) worksteal -k "not reference" $(patsubst %,tests/library/test_attention_%.py,map loss)
	@echo "[sanitize] CUDA kernels on the CPU"
	@for kinds in address,undefined thread; do \
		(driver=$$($(BIN)/python tests/cuda_on_cpu/build.py attention_driver $$kinds) && "$$driver") & jobs="$$jobs $$!"; \
	done; failed=0; for job in $$jobs; do wait $$job || failed=1; done; exit $$failed

soak: $(READY) $(TOOLS) ## the property and stress tests at length: about half an hour
	@AT_FUSED_EXAMPLES=20000 AT_FUSED_SOAK=10 $(BIN)/python -m pytest -q \
		$(addprefix tests/,library/test_properties.py library/test_stress.py library/test_triton.py \
		trainer/test_kills.py)

clean: ## remove what was built (keeps .venv and runs)
	@rm -rf build dist *.egg-info at_fused/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis $(READY) $(TOOLS)
