# effc: every target works on a fresh machine; `make demo` and `make test` need nothing before them.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test check fmt golden claims kernels bench docs tour zoo clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

venv: $(VENV)/.installed  ## create .venv with pinned versions, torch first

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[hf,test]'
	$(PIP) --editable '.[gguf]' || echo "llama-cpp-python could not be built: export to gguf stays untested here"
	$(BIN)/python -m effc.runtime.catalogue
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## install, compile the quickstart recipe, print the waterfall and a sample
	$(BIN)/effc compile specs/recipes/quickstart.effc
	$(BIN)/effc run out/small.effc --prompt "def fibonacci(n):" --max-new-tokens 48

test: $(VENV)/.installed  ## install, run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -W error -n 2

check: $(VENV)/.dev  ## format, lint, types, import floors, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	PYTHONPATH=src $(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -W error -n 2

fmt: $(VENV)/.dev  ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: $(VENV)/.installed  ## rewrite the golden files; read the diff before committing
	$(BIN)/pytest -W error --update-golden tests

claims: $(VENV)/.installed  ## slow proofs of what each method promises; ONLY=tests/... for some of them
	$(BIN)/pytest -W error -m claim --write-claims --durations=0 $(or $(ONLY),tests)

# Beside the installed one, whose version constraints.txt pins: what runs beside torch 2.11 on a GPU.
$(VENV)/triton-3.6.0: | $(VENV)/.installed
	rm -rf $@.new
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.new triton==3.6.0
	mv $@.new $@

kernels: $(VENV)/.installed $(VENV)/triton-3.6.0  ## compile every kernel for Hopper by two versions of Triton
	EFFC_TRITON_3_6=$(CURDIR)/$(VENV)/triton-3.6.0 $(BIN)/pytest -W error -m kernels --durations=0 tests

bench: $(VENV)/.installed  ## measure, print tables, write JSON beside them
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.installed  ## write docs/methods/ and the table of methods in README.md
	$(BIN)/python -m effc.runtime.pages docs/methods README.md

zoo: $(VENV)/.installed  ## train zoo:pylm again: about 40 minutes on two cores of a CPU with AMX
	$(BIN)/python -m effc.runtime.zoo tokenizer specs/zoo/pylm
	$(BIN)/effc compile specs/recipes/pylm.effc
	$(BIN)/python -m effc.runtime.zoo publish out/pylm specs/zoo/pylm

clean:  ## remove what the other targets made, the environment excepted
	rm -rf out .effc docs/methods .pytest_cache .mypy_cache .ruff_cache
