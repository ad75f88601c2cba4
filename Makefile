# Everything runs inside .venv, with relative paths: the checkout may live in a directory with spaces.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
STAMP := .venv/.installed

# The kernel of .venv, whatever kernels and settings the machine has.
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_PATH :=
export JUPYTER_PLATFORM_DIRS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests and notebooks run two at a time: one thread each.
test test-faults test-zoo test-lowest test-newest: export OMP_NUM_THREADS := 1

.PHONY: run test test-faults test-zoo test-lowest test-newest lab notebooks site bench lint clean

run: $(STAMP)  ## execute the tutorials on the built-in data into runs/
	@$(PY) -m pss run --out runs notebooks

test: $(STAMP) lint  ## lint, unit tests, notebook contract, every notebook executed and compared
	@$(PY) -m pytest -n 2 --dist loadscope --cov=pss --cov-report=term:skip-covered --cov-fail-under=90 tests
	@$(PY) -m pytest -n 2 --dist loadscope --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

# Every test of reliability, whether `make test` runs it too or not.
FAULTS := $(addprefix tests/test_,faults.py bad_input.py untrusted.py no_trace.py guards.py statistics.py reproducible.py)

test-faults: $(STAMP)  ## kills, full disks, damaged files, bad input, untrusted files, counted; under 20 minutes
	@$(PY) -m pytest -n 2 --dist worksteal -m "" $(FAULTS)

test-zoo: $(STAMP)  ## profiles of architectures of timm and transformers against autograd; installs them, about half an hour
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[test,zoo]"
	@$(PY) -m pytest -n 2 --dist worksteal -m zoo tests/test_architectures.py

# Older builds of torch bring gigabytes where there is no index of CPU builds: these stay as in constraints.txt.
KEEP ?= torch torchvision

test-lowest test-newest: test-%: $(STAMP)  ## unit tests with the lowest, the newest versions allowed, in .venv-lowest
	@echo "Installing the $* versions that pyproject.toml allows into .venv-$*"
	@test -x .venv-$*/bin/python || "$(PYTHON)" -m venv .venv-$*
	@$(PY) .ci/bounds.py $* $(KEEP) > .venv-$*/constraints.txt
	@.venv-$*/bin/python -m pip install --quiet --upgrade pip
	@.venv-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--constraint .venv-$*/constraints.txt --editable ".[test]"
	@.venv-$*/bin/python -m pytest -n 2 --dist loadscope -p no:cacheprovider tests

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@$(PY) -m jupyterlab notebooks

notebooks: $(STAMP)  ## run the committed notebooks again, in place
	@$(PY) -m pss run --in-place notebooks

site: $(STAMP)  ## the pages of the notebooks, English and Japanese, into site/
	@$(PY) docs/build.py site

bench: $(STAMP)  ## measure speed and memory against plain loops, under 15 minutes
	@$(PY) -m bench

lint: $(STAMP)  ## style, format, types, which room knows which
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports --no-logo --no-cache

clean:  ## remove what make made
	rm -rf .venv .venv-lowest .venv-newest runs site data/cache

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
		{ echo "PSS needs Python 3.11, which was not found: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || { echo "Making .venv"; "$(PYTHON)" -m venv .venv; }
	@echo "Installing pss and what it needs into .venv (about 500 MB, a few minutes the first time)"
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $(STAMP)
