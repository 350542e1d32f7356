# make demo    set up the environment and run the whole workflow on the embedded default
# make test    run the tests
# make sample DATA=<folder>   the same workflow on real photographs, captions and questions
PYTHON ?= python3.11
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin

# Without compiled modules every start of Python takes three times as long.
unexport PYTHONDONTWRITEBYTECODE
RUN := $(BIN)/python workflow/run.py

.PHONY: env demo sample test lint lock

env: $(VENV)/.complete

# --require-hashes: exactly the tested packages; the package itself is installed from this folder, editable.
$(VENV)/.complete: envs/requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "routevl: error: Python 3.11 is needed, this is " + sys.version.split()[0] + "; set PYTHON=")'
	rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r envs/bootstrap.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes --no-deps -r envs/requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: env
	$(RUN) results --cores $(CORES)

test: env
	$(BIN)/python -m pytest tests

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/python workflow/lint.py

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --universal --generate-hashes --no-header \
	  --no-annotate --no-emit-index-url --no-emit-find-links --quiet --upgrade -o envs/requirements.lock
