# syntax=docker/dockerfile:1
# The image of one service: `docker build --build-arg SERVICE=scanner-worker .`

ARG SERVICE=api-gateway

FROM python:3.13-slim-trixie AS python

# What a service needs beside Python. Only the worker needs anything.
FROM python AS for-api-gateway
FROM python AS for-job-orchestrator
FROM python AS for-result-store
FROM python AS for-scanner-worker
# `nmap-raw` is for a worker that may send raw packets (CAP_NET_RAW): it passes the right on to nmap alone. It is a second
# program because the kernel refuses to start one that is marked so where the right is not given.
RUN <<END
    set -e
    apt-get update
    apt-get install --yes --no-install-recommends nmap libcap2-bin
    cp /usr/bin/nmap /usr/local/bin/nmap-raw
    setcap cap_net_raw+ep /usr/local/bin/nmap-raw
    apt-get purge --yes --auto-remove libcap2-bin
    rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/*
END

FROM python AS build
ARG SERVICE
RUN python -m venv --without-pip /venv
# By hash; compiled, since nothing can be written where it runs.
RUN --mount=type=cache,target=/cache \
    --mount=type=bind,source=requirements/${SERVICE}.txt,target=/requirements.txt \
    pip --cache-dir /cache --python /venv/bin/python install --require-hashes --no-deps --requirement /requirements.txt
COPY shared services/${SERVICE} /app/
RUN python -m compileall -q /app

FROM for-${SERVICE}
ARG SERVICE
COPY --from=build /venv /venv
COPY --from=build /app /app
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    UVICORN_APP=${SERVICE//-/_}.main:create_app
WORKDIR /app
# Nobody in particular, by number: orchestrators can then see that it is not root.
USER 65532:65532
EXPOSE 8080
# After 5 seconds open answers are cut off, so that the rest of the patience a supervisor has is for work in hand.
ENTRYPOINT ["uvicorn", "--factory", "--http", "scanfleet.front:BoundedProtocol", "--no-server-header", "--no-proxy-headers", \
    "--host", "0.0.0.0", "--port", "8080", "--timeout-graceful-shutdown", "5"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]

ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="scanfleet ${SERVICE}" \
      org.opencontainers.image.description="Network scans as a service that prove what they did" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
