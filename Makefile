# Everything runs inside .venv, with relative paths: the checkout may live in a directory with spaces.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PY := .venv/bin/python
# What pip or, where it is there, uv installs; UV= takes pip. Python compiles what it imports; pip would compile every
# file, which takes longer than the rest of the installation.
UV ?= $(shell command -v uv)
INSTALL = $(if $(UV),"$(UV)" pip install --python $(PY),$(PY) -m pip install --no-compile) --quiet --constraint constraints.txt
# A stamp for each extra of pyproject.toml that a target needs.
RUN := .venv/.installed-notebooks
TEST := .venv/.installed-test

# The kernel of .venv, whatever kernels and settings the machine has.
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_PATH :=
export JUPYTER_PLATFORM_DIRS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What Python compiles when it first imports it, it keeps, whatever the machine says: torch alone takes seconds each time.
export PYTHONDONTWRITEBYTECODE :=

# Tests and notebooks run two at a time: one thread each.
test test-faults test-mutants test-zoo test-lowest test-newest: export OMP_NUM_THREADS := 1

.PHONY: run test test-faults test-mutants test-zoo test-lowest test-newest lab notebooks site bench lint clean

run: $(RUN)  ## execute the tutorials on the built-in data into runs/
	@$(PY) -m pss run --out runs notebooks

test: $(TEST) lint  ## lint, unit tests, notebook contract, every notebook executed and compared
	@$(PY) -m pytest -n 2 --dist loadscope --cov=pss --cov-report=term:skip-covered --cov-fail-under=90 tests
	@MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 \
		$(PY) -m pytest -n 2 --dist loadscope --nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks

# Every test of reliability, whether `make test` runs it too or not.
FAULTS := $(addprefix tests/test_,faults.py bad_input.py untrusted.py no_trace.py guards.py statistics.py reproducible.py)

test-faults: $(TEST)  ## kills, full disks, damaged files, bad input, untrusted files, counted; under 20 minutes
	@$(PY) -m pytest -n 2 --dist worksteal -m "" $(FAULTS)

test-zoo: $(TEST)  ## profiles of architectures of timm and transformers against autograd; installs them, about half an hour
	@$(INSTALL) --editable ".[test,zoo]"
	@$(PY) -m pytest -n 2 --dist worksteal -m zoo tests/test_architectures.py

FILES ?=
SAMPLE ?=
test-mutants: $(TEST)  ## change one thing at a time in the core and count what its tests see; hours, SAMPLE=50 FILES=pss/ranking.py less
	@$(INSTALL) --editable ".[test,mutants]"
	@$(PY) .ci/mutants.py $(if $(SAMPLE),--sample $(SAMPLE)) $(FILES)

# Older builds of torch bring gigabytes where there is no index of CPU builds: these stay as in constraints.txt.
KEEP ?= torch torchvision

test-lowest test-newest: test-%: $(TEST)  ## unit tests with the lowest, the newest versions allowed, in .venv-lowest
	@echo "Installing the $* versions that pyproject.toml allows into .venv-$*"
	@test -x .venv-$*/bin/python || "$(PYTHON)" -m venv .venv-$*
	@$(PY) .ci/bounds.py $* $(KEEP) > .venv-$*/constraints.txt
	@.venv-$*/bin/python -m pip install --quiet --upgrade pip
	@.venv-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--constraint .venv-$*/constraints.txt --editable ".[test]"
	@.venv-$*/bin/python -m pytest -n 2 --dist loadscope -p no:cacheprovider tests

lab: .venv/.installed-lab  ## open the notebooks in JupyterLab
	@$(PY) -m jupyterlab notebooks

notebooks: $(RUN)  ## run the committed notebooks again, in place
	@$(PY) -m pss run --in-place notebooks

site: .venv/.installed-site  ## the pages of the notebooks, English and Japanese, into site/
	@$(PY) docs/build.py site

bench: $(TEST)  ## measure speed and memory against plain loops; take half an hour without other work
	@$(PY) -m bench

lint: $(TEST)  ## style, format, types, which room knows which
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports --no-logo --no-cache

clean:  ## remove what make made
	rm -rf .venv .venv-lowest .venv-newest runs site data/cache

.PRECIOUS: .venv/.installed-%
.venv/.installed-%: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
		{ echo "PSS needs Python 3.11, 3.12 or 3.13, which was not found: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
	@test -x $(PY) || { echo "Making .venv"; "$(PYTHON)" -m venv .venv; }
	@echo "Installing pss[$*] into .venv (a few minutes the first time)"
	@$(INSTALL) --editable ".[$*]"
	@touch $@
