# Everything a person does here. `make demo` and `make test` need Python >= 3.11, Rust, and for the tests in a real
# JupyterLab a Chromium (Debian: apt-get install chromium).
.DEFAULT_GOAL := help
.PHONY: help build demo lab test test-rust test-python test-gpu wheel lint format bench bench-gpu clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS := notebooks/quickstart.ipynb notebooks/sglang_live.ipynb
RUST := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)
export PATH := $(abspath $(BIN)):$(PATH)
export VIRTUAL_ENV := $(abspath $(VENV))
unexport CONDA_PREFIX

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed, this is %s; run: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@command -v cargo >/dev/null || { echo "Rust is needed: https://rustup.rs"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt uv
	uv pip install -q --compile-bytecode -c constraints.txt -r pyproject.toml --extra transformers --extra dev
	@touch $@

$(VENV)/built: $(VENV)/installed $(RUST)
	maturin develop --release --uv -q
	@touch $@

build: $(VENV)/built ## Set up .venv and build the extension into it

demo: build ## Open the notebooks in JupyterLab; without a terminal, or with CI=true, run them and keep their pages
	@if [ -t 1 ] && [ "$$CI" != "true" ]; then $(MAKE) --no-print-directory lab; \
	else for notebook in $(NOTEBOOKS); do python notebooks/headless.py $$notebook build/demo || exit 1; done; fi

lab: build ## Open JupyterLab on the notebooks
	jupyter lab --allow-root --notebook-dir=notebooks notebooks/quickstart.ipynb

test: test-rust test-python ## Run every test

test-rust:
	cargo test --workspace --quiet
	RUSTFLAGS="--cfg loom" cargo test --quiet -p expert-lens-arena --test loom --release --target-dir target/loom

test-python: build
	python -m pytest

wheel: build ## Build the wheel that test-gpu installs
	rm -rf dist
	maturin build --release -q -o dist

test-gpu: ## Run the tests that need a GPU, from dist/*.whl: needs torch with CUDA, transformers, pytest, pytest-timeout and no Rust
	rm -rf build/gpu
	$(PYTHON) -m pip install -q --no-deps --no-index --target build/gpu dist/*.whl
	PYTHONPATH=$(abspath build/gpu) $(PYTHON) -m pytest tests/gpu

lint: build ## What must be clean before a commit
	cargo fmt --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	ruff check
	ruff format --check
	mypy
	stubtest expert_lens._core

format: build ## Lay out the code as lint wants it
	cargo fmt
	ruff check --fix
	ruff format

bench: build ## Measure what docs/performance.md claims, and write it there
	python benchmarks/run.py

bench-gpu: ## The same for what needs a GPU, with what test-gpu has installed
	PYTHONPATH=$(abspath build/gpu) $(PYTHON) benchmarks/run.py gpu_graphs gpu_batching gpu_publish gpu_generate gpu_compiled

clean: ## Remove what was built
	rm -rf $(VENV) target build dist py/expert_lens/_core.abi3.so
