# make demo    set up the environment and run the whole workflow on the embedded default
# make test    run the tests
# make test-slurm   run the workflow on a real SLURM, which is installed and started on this machine (as root, Debian or Ubuntu)
# make plan CONFIG=<file>     what a configuration would cost: jobs, GPU-hours, downloads, disk
# make codecheck              list the tables and figures for a CODECHECK, in codecheck.yml
# make sample DATA=<folder>   the same workflow on real photographs, captions and questions
PYTHON ?= python3.11
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin

# Without compiled modules every start of Python takes three times as long.
unexport PYTHONDONTWRITEBYTECODE
RUN := $(BIN)/python workflow/run.py

.PHONY: env demo sample plan codecheck test test-slurm lint lock

env: $(VENV)/.complete

# --require-hashes: exactly the tested packages; the package itself is installed from this folder, editable.
$(VENV)/.complete: envs/requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "routevl: error: Python 3.11 is needed, this is " + sys.version.split()[0] + "; set PYTHON=")'
	rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r envs/bootstrap.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes --no-deps -r envs/requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -c 'import routevl.training as t, timm, matplotlib.pyplot; t.import_libraries()'  # compiles what every job imports
	touch $@

demo: export ROUTEVL_STARTED := $(shell date +%s)
demo: env
	$(RUN) results --cores $(CORES)

# The demo's backbones unless others are named; DATA's layout is described in config/sample.yaml.
ROBERTA ?= results/backbones/roberta
GPT2 ?= results/backbones/gpt2
VIT ?= results/backbones/vit
sample: env
	@test -d '$(DATA)' || { echo "routevl: error: DATA='$(DATA)' is not a folder; see config/sample.yaml for what it holds" >&2; exit 2; }
	$(RUN) results --cores $(CORES) $(filter results/%,$(ROBERTA) $(GPT2) $(VIT))
	$(RUN) results/sample --cores $(CORES) --configfile config/sample.yaml --config \
	  'data={"root": "$(DATA)", "vocabulary": "$(DATA)/vqav2/trainval_ans2label.json"}' \
	  'backbones={"text": {"roberta": {"path": "$(ROBERTA)"}, "gpt2": {"path": "$(GPT2)"}}, "vision": {"vit": {"path": "$(VIT)"}}}'

# What a configuration would cost, before anything is spent
plan: env
	$(BIN)/python workflow/plan.py '$(CONFIG)'

# codecheck.yml, from what the workflow has made
RESULTS ?= results
codecheck: env
	$(BIN)/python workflow/codecheck.py '$(RESULTS)'

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/workflow tests/training tests/unit  # the longest first

# On a SLURM of this machine's own; as root, it installs and starts one.
test-slurm: env
	$(BIN)/python -m pytest -ra tests/slurm

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/python workflow/lint.py

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --universal --generate-hashes --no-header \
	  --no-annotate --no-emit-index-url --no-emit-find-links --quiet --upgrade -o envs/requirements.lock
