# make demo                  set up the environment and run the whole workflow on the embedded default
# make demo-full             the same data with every method, as in config/experiments/full.tsv
# make sample DATA=<folder>  the same workflow on real photographs, captions and questions
# make plan CONFIG=<file>    what a configuration would cost: jobs, GPU-hours, downloads, disk
# make rehearse              every rule of CONFIG=<file>, the demo's where left out, on a few items, into <results>/rehearsal
# make tables                the tables alone, of CONFIG=<file> and EXPERIMENTS=<run sheet>, the demo's where left out; make figures
# make report                the same results in one page, RESULTS=<folder>/report.html, once they are made; make demo does it too
# make audit                 whether everything in RESULTS=<folder> still stands
# make crate                 RESULTS=<folder> described as an RO-Crate
# make codecheck             list the tables and figures of RESULTS=<folder> for a CODECHECK, in codecheck.yml
# make docs                  write the parts of the documentation that are made from the code
# make test                  run the tests
# make test-pythons          the tests of the methods on every supported Python that is on this machine
# make test-matrix           the tests of the methods on other versions of peft, transformers and torch; VERSIONS='torch==2.12.1'
# make test-kills N=1000     kill every stage at random moments; SEED= draws others
# make test-slurm            run the workflow on a real SLURM, installed and started on this machine (as root, Debian or Ubuntu)
# make env                   set up the environment in .venv alone; PYTHON=<path> names the Python to make it with
# make lint                  check the style of the code and of the workflow
# make lock                  newest versions of all packages into envs/requirements.lock; UPGRADE= keeps those that are there
PYTHONS := 3.11 3.12 3.13
# Can a Python be used? Debian has venv in a package of its own, so a Python can be without.
USABLE := import sys, ensurepip, venv; sys.exit("%d.%d" % sys.version_info[:2] not in "$(PYTHONS)".split())
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
PYTHON ?= $(shell for p in $(PYTHONS:%=python%) python3; do $$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin

# Without compiled modules every start of Python takes three times as long.
unexport PYTHONDONTWRITEBYTECODE
RUN := $(BIN)/python workflow/run.py

# Paths reach the commands by the environment, and so need no quotes: DATA="/my photos/it's" works. For make, $$ is a dollar.
CONFIG ?= config/config.yaml
RESULTS ?= results
EXPERIMENTS ?=
export CONFIG RESULTS EXPERIMENTS DATA ROBERTA GPT2 VIT

.PHONY: env demo demo-full sample plan rehearse given tables figures report audit crate codecheck docs test test-slow test-methods test-pythons test-matrix test-kills test-slurm lint lock

env: $(VENV)/.complete

# --require-hashes: exactly the tested packages; the package itself is installed from this folder, editable. Its stages are then
# imported once, which compiles what every job imports.
$(VENV)/.complete: envs/requirements.lock pyproject.toml
	@if ! "$(PYTHON)" -c '$(USABLE)' 2>/dev/null; then \
	  echo "routevl: error: one of Python $(PYTHONS) is needed, with venv$(if $(PYTHON),; $(PYTHON) is none); set PYTHON=" >&2; \
	  exit 2; \
	fi
	rm -f $@
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r envs/bootstrap.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes --no-deps -r envs/requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -c 'import routevl.training.train, routevl.features.extract, routevl.reporting.tables, matplotlib.pyplot'
	touch $@

demo: export ROUTEVL_STARTED := $(shell date +%s)
demo: env
	$(RUN) results --cores $(CORES)

demo-full: env
	$(RUN) results --cores $(CORES) --config experiments=config/experiments/full.tsv

# The demo's backbones unless others are named; DATA's layout is described in config/sample.yaml.
ROBERTA ?= results/backbones/roberta
GPT2 ?= results/backbones/gpt2
VIT ?= results/backbones/vit
sample: env
	$(BIN)/python workflow/sample.py "$$DATA" --cores $(CORES) --roberta "$$ROBERTA" --gpt2 "$$GPT2" --vit "$$VIT"

# What a configuration would cost, before anything is spent
plan: env
	$(BIN)/python workflow/plan.py "$$CONFIG"

# Targets stand before --configfile, which would take them for more configuration files.
SNAKEMAKE = $(BIN)/snakemake --cores $(CORES) --rerun-incomplete --show-failed-logs
SET = $(if $(EXPERIMENTS),"experiments=$$EXPERIMENTS")
GIVEN = --configfile "$$CONFIG" $(if $(SET),--config $(SET))
tables figures: env given
	$(SNAKEMAKE) $@ $(GIVEN)

report: env given
	$(SNAKEMAKE) --report "$$RESULTS/report.html" $(GIVEN)

rehearse: env given
	$(SNAKEMAKE) --configfile "$$CONFIG" --config rehearsal=yes $(SET)

given:
	@test -f "$$CONFIG" || { printf 'routevl: error: CONFIG=%s is not a file\n' "$$CONFIG" >&2; exit 2; }

# From what the workflow has made
audit crate: env
	$(BIN)/routevl $@ "$$RESULTS"

codecheck: env
	$(BIN)/python workflow/codecheck.py "$$RESULTS"

docs: env
	$(BIN)/python workflow/docs.py
	$(BIN)/python workflow/docs.py --models

# The longest files first, so that no process is left with one of them at the end.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/workflow tests/training tests/unit
test: env
	$(PYTEST) -m 'not slow'

test-slow: env
	$(PYTEST) -m slow

METHOD_TESTS := $(patsubst %,tests/unit/test_%.py,methods routed ablations bottlenecks lst conditioning routing)
test-methods: env
	$(BIN)/python -m pytest -q -n 2 $(METHOD_TESTS)

# Beside the one of .venv. An environment .venv-<version> for each Python on the PATH or in pyenv; kept, and made again when the
# lock changes.
test-pythons: env
	@said=; status=0; \
	for v in $(filter-out $(shell $(BIN)/python -c '$(VERSION)' 2>/dev/null),$(PYTHONS)); do \
	  found=; \
	  for p in python$$v "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*/bin/python$$v; do \
	    if "$$p" -c '$(USABLE)' 2>/dev/null; then found=$$p; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then word="not on this machine"; \
	  elif echo "== Python $$v: $$found" && $(MAKE) --no-print-directory test-methods PYTHON="$$found" VENV=.venv-$$v; \
	  then word=passed; else word=FAILED; status=1; fi; \
	  said="$$said== Python $$v: $$word\n"; \
	done; \
	printf "$$said"; exit $$status

# The newest minor releases of each unless VERSIONS names others; prints the table of docs/COMPATIBILITY.md. Each version has an
# environment of its own in .venv-matrix, which is deleted after its turn unless KEEP=1.
test-matrix: env
	$(BIN)/python workflow/test_matrix.py $(if $(KEEP),--keep) $(VERSIONS)

# How often, by which seed, with which series alone, and where results are kept for the next time
N ?= 1000
SEED ?= 1
test-kills: env
	$(BIN)/python tests/kills.py $(N) --seed $(SEED) --cores $(CORES) $(if $(ONLY),--only $(ONLY)) $(if $(FOLDER),--folder '$(FOLDER)')

# On a SLURM of this machine's own; as root, it installs and starts one.
test-slurm: env
	$(BIN)/python -m pytest -ra tests/slurm

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/python workflow/lint.py

UPGRADE ?= --upgrade
lock:
	$(BIN)/uv pip compile pyproject.toml --all-extras --python-version $(firstword $(PYTHONS)) --universal --generate-hashes \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet $(UPGRADE) -o envs/requirements.lock
