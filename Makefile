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
test: export OMP_NUM_THREADS := 1

.PHONY: run test lab notebooks site bench lint clean

run: $(STAMP)  ## execute the tutorials on the built-in data into runs/
	@$(PY) -m pss.batch --out runs notebooks

test: $(STAMP)  ## lint, unit tests, notebook contract, every notebook executed and compared
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pytest -n 2 --dist loadscope tests
	@$(PY) -m pytest -n 2 --dist loadscope --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@$(PY) -m jupyterlab notebooks

notebooks: $(STAMP)  ## run the committed notebooks again, in place
	@$(PY) -m pss.batch --in-place notebooks

site: $(STAMP)  ## the pages of the notebooks, English and Japanese, into site/
	@$(PY) docs/build.py site

bench: $(STAMP)  ## measure speed and memory against plain loops, under 15 minutes
	@$(PY) -m bench

lint: $(STAMP)
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

clean:  ## remove what make made
	rm -rf .venv runs site data/cache

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
		{ echo "PSS needs Python 3.11, which was not found: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || { echo "Making .venv"; "$(PYTHON)" -m venv .venv; }
	@echo "Installing pss and what it needs into .venv (about 500 MB, a few minutes the first time)"
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $(STAMP)
