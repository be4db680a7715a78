# `make` lists the targets. Every install comes from requirements.lock, into .venv.
PYTHON ?= python3
# cpu, or auto on a machine with a GPU. Not used when PIP_FIND_LINKS names a folder with a torch wheel.
TORCH_BACKEND ?= cpu
TEST ?= tests
# --once: end after the first answer
DEMO ?=

BIN := .venv/bin
STAMP := .venv/.installed
# Packages that tests of real servers need, Debian's names.
SERVICES := bubblewrap chromium docker-compose fonts-liberation nginx-light openssl redis-server postgresql prometheus prometheus-alertmanager tini wrk

FROM = $(if $(strip $(PIP_FIND_LINKS)),$(foreach d,$(PIP_FIND_LINKS),--find-links "$(d)"),--torch-backend=$(TORCH_BACKEND))
SUDO = $(if $(filter 0,$(shell id -u)),,sudo)
UVX := $(BIN)/uv tool run --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo env test prepare lab ingest train promote report monitor kpis whatif search batch materialize argo serve app bench services walkthroughs docs client docs-serve lock clean chart helm

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## everything from a simulated shop to a page with recommendations; Ctrl-C ends it
	@exec $(BIN)/python -m app.demo $(DEMO)

install: $(STAMP) ## .venv with everything, and nothing else

test: $(STAMP) lint types ## lint and types; notebooks clean, exported and running; then pytest (TEST=tests/test_api.py for a part)
	$(BIN)/nbdev-test --n-workers 2 --do-print
	$(BIN)/pytest $(TEST)

lint: $(STAMP) ## ruff over all that is written by hand, bash's own look at scripts
	@$(BIN)/ruff check .
	@for f in .ci/run $$(find app deploy -name '*.sh'); do bash -n "$$f" || exit 1; done

types: $(STAMP) ## mypy over reco, app and flows ([tool.mypy] in pyproject.toml)
	@$(BIN)/mypy

notebooks: $(STAMP) ## reco/ is what the notebooks export, they are clean, they import downwards, they run
	$(BIN)/pytest -q tests/test_notebooks.py tests/test_layers.py
	$(BIN)/nbdev-test --n-workers 2 --do-print

prepare: $(STAMP) ## after editing notebooks: export them, test them, clean them
	$(BIN)/nbdev-export
	$(BIN)/nbdev-test --n-workers 2
	$(BIN)/nbdev-clean

hooks: $(STAMP) ## git shows notebooks by cell, merges them by cell, and trusts what it pulls
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev-install-hooks

lab: $(STAMP) ## JupyterLab on the notebooks
	@exec $(BIN)/jupyter lab nbs

ingest: $(STAMP) ## raw files into the lake
	@exec $(BIN)/python flows/ingest.py run

train: $(STAMP) ## the lake into a model bundle, which is served if it passes the gates
	@$(BIN)/python flows/train.py run && exec $(BIN)/python flows/promote.py run

promote: $(STAMP) ## hold the newest bundle to the gates again
	@exec $(BIN)/python flows/promote.py run

report: $(STAMP) ## the walkthrough notebooks on the newest bundle, as pages
	@exec $(BIN)/python flows/report.py run

monitor: $(STAMP) ## hold the last days beside what the champion learned from; train anew if they ask for it
	@exec $(BIN)/python flows/monitor.py run

kpis: $(STAMP) ## what the lists earned in the last days, and what experiments say
	@exec $(BIN)/python flows/kpis.py run

whatif: $(STAMP) ## what other strengths of exploration would have earned, from the lists that were shown
	@exec $(BIN)/python -m app.what_if

search: $(STAMP) ## better settings, found on validation: a proposal for a person to read
	@exec $(BIN)/python flows/search.py run

batch: $(STAMP) ## lists of all shoppers at once, into the lake
	@exec $(BIN)/python flows/batch.py run

materialize: $(STAMP) ## pasts of shoppers and features of items into the online store
	@exec $(BIN)/python flows/materialize.py run

argo: $(STAMP) ## every flow as objects of Argo Workflows, in deploy/argo/compiled (needs S3, no cluster: deploy/argo/README.md)
	@exec $(BIN)/python flows/argo.py

chart: $(STAMP) ## what is made of the Helm chart: copies, schema of the settings, table of values, rendered examples
	@exec $(BIN)/python deploy/helm/make_chart.py

helm: .venv/.uv ## Helm into .venv/bin, where the machine has none (Linux on x86-64)
	@$(BIN)/python deploy/helm/get_helm.py

serve: $(STAMP) ## the endpoint on the newest bundle
	@exec $(BIN)/python -m app.serve

app: $(STAMP) ## the Streamlit app
	@exec $(BIN)/python -m app.dashboard

env: ## .env and deploy/secrets for docker-compose.yml, with strong secrets; what is there stays
	@$(PYTHON) deploy/make_env.py

bench: $(STAMP) ## speed and quality, written to benchmarks/
	@for f in $(filter-out $(patsubst %,benchmarks/%.py,__init__ base endpoint peers peer_library quality serving slices),$(wildcard benchmarks/*.py)); do $(BIN)/python -m benchmarks.$$(basename $$f .py) || exit 1; done

services: ## Debian packages that tests of real servers need (optional on a laptop: the tests say what they skip)
	@command -v apt-get > /dev/null || { echo "make services needs apt-get (Debian, Ubuntu). Install by hand: $(SERVICES)"; exit 1; }
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SERVICES)
	@$(MAKE) --no-print-directory helm || echo 'tests of the Helm chart will be skipped'

# Its theme says at every build that it will be succeeded; the lock decides here.
walkthroughs: $(STAMP) ## nbs/9x on real files, outputs kept (FILES="retailrocket=FOLDER online_retail=FOLDER")
	@$(BIN)/python docs/make_walkthroughs.py $(FILES)
	@$(BIN)/nbdev-clean

docs: $(STAMP) ## the documentation site, into _site, without a network
	@NO_MKDOCS_2_WARNING=1 exec $(BIN)/mkdocs build

docs-serve: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 exec $(BIN)/mkdocs serve

client: $(STAMP) ## clients/typescript/reco.d.ts anew from the HTTP contract (needs npm)
	@$(BIN)/python clients/typescript/openapi.py > clients/typescript/openapi.json
	@cd clients/typescript && npm ci --no-audit --no-fund --silent && npx --no-install openapi-typescript openapi.json --output reco.d.ts

# ---- what CI looks at beside the tests; each tool with its version, so that a laptop finds the same --------------------

.PHONY: install lint types notebooks hooks audit secrets leaks workflows dockerfiles images smoke scan chartlint kind platform links dist version notes
TAG ?= v$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' reco/__init__.py)
VERSION := $(TAG:v%=%)
IMAGES ?= endpoint app flows
DOCKER_RUN := docker run --rm -v "$(CURDIR)":/repo -w /repo
CHART := deploy/helm/reco
KIND ?= reco

audit: .venv/.uv ## packages of requirements.lock with holes that are known (asks PyPI)
	$(UVX) pip-audit==2.10.1 --strict --no-deps --disable-pip --requirement requirements.lock

# Words that stand for a password in examples and tests, names of Secrets and of variables, and sentences. Random-looking text is not asked for: checksums and pictures are.
EXAMPLES := ^(secret|password|hunter2|pw|hush|hush-hush|hush-hush-key|top%40secret|short|reco(-[a-z]+)?|RECO_[A-Z_]+|AKIATEST|.* .*)$$
secrets: .venv/.uv ## keys and passwords in files that git knows
	git ls-files -z | grep -zv -e '\.png$$' -e '\.lock$$' | xargs -0 $(UVX) --from detect-secrets==1.5.0 detect-secrets-hook \
		--disable-plugin Base64HighEntropyString --disable-plugin HexHighEntropyString --exclude-secrets '$(EXAMPLES)'

leaks: ## keys and passwords in the whole history (needs Docker)
	$(DOCKER_RUN) ghcr.io/gitleaks/gitleaks:v8.30.1 git --redact --no-banner /repo

workflows: .venv/.uv ## GitHub's workflows: what is unsafe in them; where Docker is, actionlint too
	$(UVX) zizmor==1.32.0 --offline --quiet --min-severity medium .github
	@docker info > /dev/null 2>&1 && exec $(DOCKER_RUN) rhysd/actionlint:1.7.12 -color || echo "no Docker here: actionlint was left out"

dockerfiles: ## hadolint over deploy/docker (needs Docker)
	$(DOCKER_RUN) hadolint/hadolint:v2.14.0-debian hadolint --failure-threshold warning $(IMAGES:%=deploy/docker/%.Dockerfile)

images: ## reco/endpoint, reco/app, reco/flows (needs Docker; IMAGES=app for one)
	@for name in $(IMAGES); do docker build --file deploy/docker/$$name.Dockerfile --tag reco/$$name:$(VERSION) \
		--build-arg GIT_SHA=$$(git rev-parse HEAD) . || exit 1; done

smoke: ## start each image as the platform does: no root, nothing written outside of two folders (needs Docker)
	@for name in $(IMAGES); do deploy/docker/smoke.sh $$name reco/$$name:$(VERSION) || exit 1; done

scan: ## holes of the images that are known and could be closed (needs Docker)
	@for name in $(IMAGES); do docker run --rm -v /var/run/docker.sock:/var/run/docker.sock -v reco-trivy:/cache aquasec/trivy:0.75.0 --cache-dir /cache image \
		--no-progress --exit-code 1 --ignore-unfixed --severity HIGH,CRITICAL --scanners vuln reco/$$name:$(VERSION) || exit 1; done

chartlint: ## the Helm chart: lint, and what it makes of its examples held to Kubernetes' schemas (needs helm and Docker)
	helm lint --strict $(CHART)
	@for values in $(CHART)/values.yaml $(wildcard $(CHART)/examples/*.yaml $(CHART)/ci/kind-values.yaml); do echo "$$values"; \
		helm template reco $(CHART) --namespace reco --values "$$values" | docker run --rm -i ghcr.io/yannh/kubeconform:v0.7.0 -strict -summary \
		-schema-location default -schema-location 'https://raw.githubusercontent.com/datreeio/CRDs-catalog/main/{{.Group}}/{{.ResourceKind}}_{{.ResourceAPIVersion}}.json' - || exit 1; done

kind: ## the chart in the cluster of kind's that is running, with the images that are here: install, ask, upgrade, roll back (needs kind, kubectl, helm)
	kind load docker-image --name $(KIND) $(IMAGES:%=reco/%:$(VERSION))
	$(CHART)/ci/kind.sh

platform: env ## the whole platform with Docker, until its gateway gives a list; it stays up
	docker compose config --quiet
	docker compose up --detach --build
	@deploy/ask.sh http://127.0.0.1:8080 || { docker compose ps --all; docker compose logs --tail 80; exit 1; }

links: ## links of the site that lead nowhere (make docs first; needs Docker)
	$(DOCKER_RUN) lycheeverse/lychee:0.24.2 --no-progress --root-dir /repo/_site --exclude '^https?://(127\.0\.0\.1|localhost)' '_site/**/*.html'

dist: .venv/.uv ## source and wheel of the package, in dist/
	@rm -rf dist
	$(BIN)/uv build --quiet --python $(BIN)/python --out-dir dist
	$(UVX) twine==6.2.0 check --strict dist/*

version: ## the version, for scripts
	@echo $(VERSION)

notes: ## what CHANGELOG.md says of TAG; fails where version, changelog, citation or chart say something else
	@$(PYTHON) deploy/release.py $(TAG)

clean: ## remove what make made; data, lake and bundles stay
	rm -rf .venv .demo _site clients/typescript/node_modules .pytest_cache .ruff_cache .mypy_cache .hypothesis dist build *.egg-info
	find app flows reco tests data benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The lock: all extras, every platform. What only torch's CUDA build needs is taken out, so that the CPU build brings
# nothing of it; the CUDA build installs its own.
lock: .venv/.uv ## requirements.lock anew from pyproject.toml, newest versions that fit
	@rm -f requirements.lock.new
	@env -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --no-emit-index-url \
		--no-header --quiet --output-file requirements.lock.new
	@{ echo "# Made by make lock from pyproject.toml: every package of every extra, on Linux and macOS, Python 3.11 to 3.13."; \
	   echo "# Without nvidia-*, cuda-* and triton: they belong to torch's CUDA build, which brings them itself."; \
	   grep -v -E '^(nvidia-|cuda-|triton)' requirements.lock.new; } > requirements.lock.tmp
	@! grep -n -E '://|^-|@ |\+cpu' requirements.lock.tmp || { echo "a machine's path or address got into the lock"; exit 1; }
	@mv requirements.lock.tmp requirements.lock && rm requirements.lock.new
	@echo "requirements.lock: $$(grep -c == requirements.lock) packages"

# A working .venv is kept, a broken one made anew.
.venv/.uv:
	@python=$(PYTHON); [ ! -x $(BIN)/python ] || python=$(BIN)/python; \
	command -v $$python > /dev/null || { echo "no $$python here: install Python 3.11, 3.12 or 3.13, or name it: make PYTHON=python3.12"; exit 1; }; \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; $$python is $$($$python -V 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	@echo "[1/3] .venv"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@touch $@

# What is installed is compiled at once: else each of Ray's first ten processes does it for itself, all at the same time,
# and Ray misses its own deadline for starting. Not these, which are four fifths of the files and seldom imported.
UNCOMPILED := plotly|transformers|torch|kubernetes|sympy|moto|mlflow|statsmodels|faker|evidently|cfnlint|litestar|nltk|networkx|$\
	pandas|sklearn|sqlalchemy|matplotlib|fontTools|pygments|debugpy|setuptools|pip|optuna|sentence_transformers|$\
	huggingface_hub|whylogs|whylabs_client|tests?

# .installing marks an install that did not come to its end: the next run then puts every package in place anew.
$(STAMP): .venv/.uv requirements.lock pyproject.toml
	@echo "[2/3] packages of requirements.lock (about 3 GB; minutes, once)"
	@again=$$([ ! -e .venv/.installing ] || echo --reinstall); touch .venv/.installing; \
	$(BIN)/uv pip install --python $(BIN)/python $(FROM) $$again -r requirements.lock
	@echo "[3/3] reco itself"
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps -e .
	@$(BIN)/python -m compileall -qq -j 0 -x '/($(UNCOMPILED))/' .venv/lib || true
	@rm -f .venv/.installing && touch $@
