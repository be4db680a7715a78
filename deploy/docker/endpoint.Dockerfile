# The endpoint, and the consumer: what answering and writing down need, and nothing of training.
#   docker build -f deploy/docker/endpoint.Dockerfile -t reco/endpoint:0.1.0 .
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS packages
ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_LINK_MODE=copy
WORKDIR /build
RUN python -m pip install --disable-pip-version-check --quiet uv==0.13.9
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml requirements.lock ./
RUN uv pip install --python /opt/venv/bin/python --constraint requirements.lock --requirement pyproject.toml --extra kafka

FROM python:${PYTHON}
ARG GIT_SHA=unknown
# libgomp1 is LightGBM's; tini hands signals on and takes in what Ray leaves behind.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libgomp1 tini && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 reco && useradd --uid 10001 --gid reco --no-create-home --home-dir /tmp --shell /usr/sbin/nologin reco && install -d -o reco -g reco /var/lib/reco
COPY --from=packages /opt/venv /opt/venv
WORKDIR /srv/reco
COPY settings.ini LICENSE ./
COPY app app
COPY reco reco
# Without servers everything that is written lies below /var/lib/reco; a variable of yours wins.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/srv/reco PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp GIT_SHA=${GIT_SHA} \
    RECO_SETTINGS=/srv/reco/settings.ini NUMBA_CACHE_DIR=/var/lib/reco/numba RECO_LAKE_ROOT=/var/lib/reco/lake RECO_BUNDLES_ROOT=/var/lib/reco/bundles \
    RECO_BUNDLES_CACHE=/var/lib/reco/bundle_cache RECO_ONLINE_FOLDER=/var/lib/reco/online RECO_SERVING_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8000 9201
HEALTHCHECK --interval=10s --timeout=4s --start-period=120s --retries=3 CMD ["python", "-m", "app.alive", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "app.serve"]
