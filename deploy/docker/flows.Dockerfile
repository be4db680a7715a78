# The flows, what schedules them, the first start, MLflow's server; with EXTRAS="--extra train --extra dev" JupyterLab too. PyTorch is the CPU's.
#   docker build -f deploy/docker/flows.Dockerfile -t reco/flows:0.1.0 .
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS packages
ARG EXTRAS="--extra train"
ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_LINK_MODE=copy
WORKDIR /build
RUN python -m pip install --disable-pip-version-check --quiet uv==0.13.9
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml requirements.lock ./
RUN uv pip install --python /opt/venv/bin/python --torch-backend=cpu --constraint requirements.lock --requirement pyproject.toml ${EXTRAS}

FROM python:${PYTHON}
ARG GIT_SHA=unknown
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libgomp1 tini && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 reco && useradd --uid 10001 --gid reco --no-create-home --home-dir /tmp --shell /usr/sbin/nologin reco && install -d -o reco -g reco /var/lib/reco /var/lib/figures
COPY --from=packages /opt/venv /opt/venv
WORKDIR /srv/reco
COPY settings.ini pyproject.toml LICENSE ./
COPY app app
COPY data data
COPY flows flows
COPY nbs nbs
COPY reco reco
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/srv/reco PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp GIT_SHA=${GIT_SHA} \
    RECO_SETTINGS=/srv/reco/settings.ini NUMBA_CACHE_DIR=/var/lib/reco/numba RECO_LAKE_ROOT=/var/lib/reco/lake RECO_BUNDLES_ROOT=/var/lib/reco/bundles \
    RECO_BUNDLES_CACHE=/var/lib/reco/bundle_cache RECO_ONLINE_FOLDER=/var/lib/reco/online RECO_DATA_PATH=/var/lib/reco/raw RECO_DATA_SCRATCH=/var/lib/reco/scratch \
    RECO_TRACKING_FOLDER=/var/lib/reco/mlflow RECO_SEARCH_FILE=/var/lib/reco/search.db RECO_SEARCH_OUT=/var/lib/reco/best.ini METAFLOW_DATASTORE_SYSROOT_LOCAL=/var/lib/reco METAFLOW_TEMPDIR=/var/lib/reco METAFLOW_ARTIFACT_LOCALROOT=/var/lib/reco
USER 10001:10001
EXPOSE 5000 8888
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "app.schedule"]
