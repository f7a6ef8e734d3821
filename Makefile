# Everything a fresh machine needs besides this: Linux, make, git, and Python 3.11, 3.12 or 3.13 with venv.
# The first call sets up .venv (2.7 GB) with the versions in uv.lock; later calls find it done.

SET ?= demo
# Where the drawing of all BreakHis' pictures is kept.
REPLICA = .breakhis/cache/bench
PYTHON ?=
UV_VERSION := 0.13.9

UV := .venv-uv/bin/uv
BREAKHIS := .venv/bin/breakhis
# The one that was named; else the machine's own, else any that fits.
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)

.DEFAULT_GOAL := help
.PHONY: help run demo up down status doctor test product trust e2e fuzz replica guide gpu bench images secrets lint advisories sbom screenshots

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  SET=name or SET=file.yaml chooses the training set of run and demo (default: demo)."
	@echo "  PYTHON=/path/to/python chooses the Python to set up with (3.11, 3.12 or 3.13)."

run: .venv/.run ## Set up, start Airflow and MLflow, run the workflow; reviews wait in the UI
	@$(BREAKHIS) run "$(SET)"

demo: .venv/.run ## The same without a person: approve over the API, check the champions, stop
	@$(BREAKHIS) demo "$(SET)"

up: .venv/.run ## Start Airflow and MLflow
	@$(BREAKHIS) up

down: .venv/.run ## Stop them; data and waiting reviews are kept
	@$(BREAKHIS) down

status: .venv/.run ## What runs, and where
	@$(BREAKHIS) status

doctor: .venv/.run ## Check this machine and say what is missing
	@$(BREAKHIS) doctor

test: .venv/.dev ## Set up and run the tests (ARGS="…" goes to pytest)
	@.venv/bin/pytest $(SPREAD) $(ARGS)

product: .venv/.dev ## Set up, and test the whole product: Airflow, MLflow, two retrainings and their reviews
	@BREAKHIS_PRODUCT=1 .venv/bin/pytest tests/e2e/test_product.py $(ARGS)

trust: .venv/.dev ## Set up, and try to get round gates, review and audit log; prints a row an attempt (ARGS="bypass" for one part)
	@.venv/bin/python -m tests.trust $(ARGS)

fuzz: .venv/.dev ## Set up, and feed made inputs of every kind to the product; prints a table (ARGS="--inputs 100000 --seed 2")
	@.venv/bin/python -m tests.fuzz $(ARGS)

e2e: .venv/.dev ## Set up, build the images, and test the compose stack on a Docker engine
	@tests/e2e/run.sh $(ARGS)

replica: .venv/.dev ## Set up, draw all of BreakHis' pictures (4.4 GB, kept), and test ingestion on them
	@BREAKHIS_REPLICA=$(REPLICA) .venv/bin/pytest tests/data/sources/test_replica.py $(ARGS)

guide: .venv/.dev ## Set up, and follow docs/add-a-data-source.md command by command in a real Airflow
	@BREAKHIS_GUIDE=1 .venv/bin/pytest tests/docs $(ARGS)

gpu: .venv/.gpu ## Set up with CUDA's libraries (3 GB), and test what a GPU computes
	@BREAKHIS_GPU=1 .venv/bin/pytest tests/gpu $(ARGS)

bench: .venv/.dev ## Measure speed and memory on this machine (ARGS="--images 640" for a quick look)
	@.venv/bin/python -m tests.benchmarks $(ARGS)

images: ## Build the images of docker-compose.yaml
	@docker/build.sh

secrets: ## Write .env for docker-compose.yaml, with passwords and keys of its own
	@python3 docker/make_secrets.py

lint: .venv/.dev ## Check style, types, who imports whom, and that no secret is in a file
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@PYTHONPATH=plugins .venv/bin/lint-imports
	@.ci/scan-secrets

advisories: .venv-uv/.$(UV_VERSION) ## Ask the OSV database for known weaknesses in what uv.lock names (needs the network)
	@$(UV) audit --frozen --preview-features audit-command $(ARGS)

sbom: .venv-uv/.$(UV_VERSION) ## Write sbom.cdx.json: what uv.lock names, with hashes, as CycloneDX 1.5
	@$(UV) export --quiet --frozen --no-dev --all-extras --format cyclonedx1.5 --preview-features sbom-export --output-file sbom.cdx.json

screenshots: .venv/.dev ## Set up, and take the pictures of README and docs from a stack of its own (needs chromium)
	@$(SYNC) --group screenshots
	@BREAKHIS_HOME="$(CURDIR)/.breakhis/screenshots" .venv/bin/python docs/images/make_screenshots.py

# Servers and waiting take half of the tests' time, so there is one process more than cores, up to four. A file's tests
# stay together, and the longest come early.
SPREAD = --numprocesses=$$(n=$$(nproc); echo $$((n < 3 ? n + 1 : 4))) --dist=loadfile --no-loadscope-reorder

# --- set-up -----------------------------------------------------------------------------------------------------------

# An environment for tests has all that running needs; it is not taken down again by 'make run'.
.venv/.run: uv.lock pyproject.toml .venv-uv/.$(UV_VERSION)
	@if [ .venv/.dev -nt uv.lock ] && [ .venv/.dev -nt pyproject.toml ]; then :; else $(SYNC) --no-dev; fi
	@touch $@

# What the servers have beside it, for the tests of it.
.venv/.dev: EXTRAS += --extra fab
.venv/.dev: uv.lock pyproject.toml .venv-uv/.$(UV_VERSION)
	@$(SYNC)
	@touch $@

.venv/.gpu: EXTRAS += --extra fab --extra gpu
.venv/.gpu: uv.lock pyproject.toml .venv-uv/.$(UV_VERSION)
	@$(SYNC)
	@touch $@ .venv/.dev

.venv-uv/.$(UV_VERSION):
	@$(FIND_PYTHON); echo "Setting up with $$python" >&2; \
	rm -rf .venv-uv && "$$python" -m venv .venv-uv && \
	.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION) && \
	echo "$$python" > .venv-uv/python && touch $@

# With the Python that was found: uv would download one of its own otherwise. Inexact: what else somebody has installed
# there, such as the group for screenshots, stays.
SYNC = env -u VIRTUAL_ENV UV_PYTHON_DOWNLOADS=never $(UV) sync --frozen --inexact $(EXTRAS) --python "$(or $(PYTHON),$$(cat .venv-uv/python))"

EXTRAS := --extra airflow --extra data --extra mlflow-server --extra train

FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
define FIND_PYTHON
python=; bare=; \
for candidate in $(CANDIDATES); do \
  "$$candidate" -c '$(FITS)' >/dev/null 2>&1 || continue; \
  if "$$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; \
  then python=$$("$$candidate" -c 'import sys; print(sys.executable)'); break; else bare=$$candidate; fi; \
done; \
if [ -z "$$python" ] && [ -n "$$bare" ]; then \
  echo "error: $$bare cannot make virtual environments; install venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; \
elif [ -z "$$python" ]; then \
  echo "error: no Python 3.11, 3.12 or 3.13 among: $(CANDIDATES); install one (Debian, Ubuntu: apt install python3 python3-venv) or say make PYTHON=/path/to/python" >&2; exit 1; \
fi
endef
