# Every target works as the first command on a fresh clone: each makes the environment it needs.
PYTHON ?= python3
OUT ?= digits.png
BENCH ?= overhead.json

VENV := .venv
BENCH_VENV := .venv-bench
RUN := $(VENV)/bin/python
# Tests read fields that a backward pass leaves on parameters, and submodules: attributes that a type checker cannot know.
LOOSE := $(addprefix --disable-error-code=,arg-type assignment attr-defined func-returns-value index operator union-attr) --no-warn-unused-ignores --cache-dir=.mypy_cache/tests

.DEFAULT_GOAL := help
.PHONY: help setup generate check test demo bench mutants kernels clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  \033[36mmake %-9s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp ## Create .venv with everything pinned (nothing to do when it is up to date)

generate: setup ## Emit generated/ from the definitions
	$(RUN) -m satchel_gen generate

check: setup ## Stale output, lint, format, types
	$(RUN) -m satchel_gen check
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m mypy tests $(LOOSE)

test: setup ## Run the tests (ARGS="-k relu" selects)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 $(ARGS)

demo: setup ## Train on digits with KFAC, SGD and Adam; writes digits.png (OUT=...)
	$(RUN) examples/digits.py --out $(OUT)

bench: $(BENCH_VENV)/.stamp ## Measure the overhead of each feature beside other packages; writes overhead.json, .md, .png (BENCH=... ARGS="--quick")
	$(BENCH_VENV)/bin/python benchmarks/overhead.py --out $(BENCH) $(ARGS)

mutants: setup ## Break the generator on purpose and show that the tests notice
	OMP_NUM_THREADS=1 $(RUN) tests/mutants.py $(ARGS)

kernels: setup ## Compile every Triton kernel ahead of time; registers, shared memory and spills per target
	$(RUN) -m satchel_gen kernels

clean: ## Remove environments, caches and outputs (never generated/)
	rm -rf $(VENV) $(BENCH_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis digits.png overhead.json overhead.md overhead.png
	find gen generated tests examples benchmarks -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/.stamp: EXTRA := dev
$(BENCH_VENV)/.stamp: EXTRA := bench
$(VENV)/.stamp $(BENCH_VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("satchel needs Python 3.10 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA)]'
	touch $@
