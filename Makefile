# avdd_nb: `make demo` and `make test` are all a newcomer needs. `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
SLOW    ?=
NB      ?=

BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check
CHANGED   := settings.ini constraints.txt setup.py
TEST_DEPS := dev,video,demo,encoders,language,ray,slurm,hub

# Threads of several processes on the same cores slow each other down, up to 90-fold (BLAS and OpenMP spin).
test pictures: export OMP_NUM_THREADS = 1
test: export MPLBACKEND = Agg
test: export SLOW := $(SLOW)

.PHONY: help demo lab class test export readme pictures screenshots bench tables constraints clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-13s%s\n", $$1, $$2 }' Makefile
	@echo; echo "  options: PYTHON=python3.12  VENV=.venv  WORKERS=2  SLOW=1 (slow tests too)  NB='nbs/a.ipynb …' (pictures)"

demo: $(VENV)/.installed  ## install if needed, then distil the built-in data and write a report (about 2 minutes)
	@$(BIN)/avdd demo

lab: $(VENV)/.installed  ## open JupyterLab on the start page
	@$(BIN)/avdd lab

class: $(VENV)/.installed-demo  ## serve the chapters to a class with Voilà, with quotas (IP=0.0.0.0: to the network)
	@$(BIN)/avdd lab --voila --port 8866 --ip $(or $(IP),127.0.0.1)

test: $(VENV)/.installed-dev  ## every test: the notebooks, then tests/ (SLOW=1: the slow ones too)
	$(BIN)/nbdev_test --n_workers $(WORKERS) --timing $(if $(SLOW),--flags slow)
	$(BIN)/python -m pytest tests -q -n $(WORKERS) --timeout 900

export: $(VENV)/.installed-dev  ## notebooks to modules, then clean the notebooks' metadata
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(VENV)/.installed-dev  ## README.md from nbs/index.ipynb
	$(BIN)/python -m avdd_nb.dev readme

pictures: $(VENV)/.installed-dev  ## run the notebooks and keep small pictures in them (NB=… for some only)
	$(BIN)/python -m avdd_nb.dev pictures $(NB)
	$(BIN)/nbdev_clean

screenshots: $(VENV)/.installed-dev  ## the panel's pictures on the start page, from a run in JupyterLab (needs chromium)
	$(BIN)/python tests/screenshots.py

bench: $(VENV)/.installed  ## seconds a step: the published loop and ours
	$(BIN)/python benchmarks/distill_step.py

tables: $(VENV)/.installed  ## every table of the papers at its tiny scale, with the time of each (about 20 minutes)
	$(BIN)/avdd sweep nbs/sweeps/tables.yaml --out runs/tables --workers 1

constraints: $(VENV)/.installed-dev  ## write the versions of this environment into constraints.txt
	$(BIN)/python -m avdd_nb.dev constraints

clean:  ## remove caches and build leftovers (not the environment, data or runs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis _proc _docs
	find nbs avdd_nb tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

# The environment. It is installed again only when one of the files in CHANGED is newer than its stamp.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "avdd_nb needs Python 3.10 or newer; $(PYTHON) is older or missing. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) (the first time takes a few minutes and about 6 GB, most of it PyTorch) …"
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python cannot make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.installed: $(CHANGED) | $(BIN)/pip
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-demo: $(CHANGED) | $(BIN)/pip
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(CHANGED) | $(BIN)/pip
	$(PIP) install -q -c constraints.txt -e '.[$(TEST_DEPS)]'
	@touch $(VENV)/.installed $@
