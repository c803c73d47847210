# One image per role: docker build --target gateway|prefill|decode|kvstore .
# BASE_IMAGE is any glibc image with Python 3.11 or 3.12 as python3, venv and pip included.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

# Baton itself as one wheel, so that a change of the code reinstalls no dependency.
FROM base AS wheel
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY baton baton
COPY common common
COPY services services
RUN python3 -m venv /opt/build \
    && PIP_CONSTRAINT=constraints.txt /opt/build/bin/pip wheel --no-deps -w /dist .

# What each role depends on: pyproject.toml without the packages gives the dependencies alone.
FROM base AS dependencies
WORKDIR /src
RUN python3 -m venv /opt/baton
COPY pyproject.toml constraints.txt README.md LICENSE ./

FROM dependencies AS gateway-build
RUN /opt/baton/bin/pip install -c constraints.txt ".[gateway,observability]" \
    && /opt/baton/bin/pip uninstall -y baton
COPY --from=wheel /dist /dist
RUN /opt/baton/bin/pip install --no-deps /dist/*.whl

FROM dependencies AS kvstore-build
RUN /opt/baton/bin/pip install -c constraints.txt ".[kvstore,observability]" \
    && /opt/baton/bin/pip uninstall -y baton
COPY --from=wheel /dist /dist
RUN /opt/baton/bin/pip install --no-deps /dist/*.whl

FROM dependencies AS worker-build
# An index that has the CPU build of torch, for a smaller image; without one pip asks the index that
# the base image is set up with. An image whose pip is set to no-index ignores it.
ARG TORCH_INDEX=
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" \
    /opt/baton/bin/pip install -c constraints.txt ".[worker,observability]" \
    && /opt/baton/bin/pip uninstall -y baton
COPY --from=wheel /dist /dist
RUN /opt/baton/bin/pip install --no-deps /dist/*.whl

# No shell in the user's entry, no home, nothing to write: the root file system may be read-only.
FROM base AS runtime
RUN echo 'baton:x:10001:10001::/nonexistent:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'baton:x:10001:' >> /etc/group
ENV PATH=/opt/baton/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /
USER 10001:10001
STOPSIGNAL SIGTERM

FROM runtime AS gateway
COPY --from=gateway-build /opt/baton /opt/baton
COPY models /models
EXPOSE 8000 9000
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "common.rpc.probe", "http://127.0.0.1:8000/ready"]
ENTRYPOINT ["baton", "serve", "gateway"]
CMD ["--host", "0.0.0.0", "--model", "/models/baton-tiny"]

FROM runtime AS kvstore
COPY --from=kvstore-build /opt/baton /opt/baton
EXPOSE 7300
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "common.rpc.probe", "127.0.0.1:7300"]
ENTRYPOINT ["baton", "serve", "kvstore"]
CMD ["--host", "0.0.0.0"]

# Compiled kernels, so that only a machine's first worker waits for them. What lies in the folder is
# run: it is the user's alone, also in a volume, which takes its owner from here.
FROM runtime AS worker
COPY --from=worker-build /opt/baton /opt/baton
COPY models /models
USER 0:0
RUN install -d -m 0700 -o 10001 -g 10001 /var/cache/baton
USER 10001:10001
ENV XDG_CACHE_HOME=/var/cache/baton

FROM worker AS prefill
EXPOSE 7100
HEALTHCHECK --interval=5s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-m", "common.rpc.probe", "127.0.0.1:7100"]
ENTRYPOINT ["baton", "serve", "prefill"]
CMD ["--host", "0.0.0.0", "--model", "/models/baton-tiny"]

FROM worker AS decode
EXPOSE 7200 7201
HEALTHCHECK --interval=5s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-m", "common.rpc.probe", "127.0.0.1:7200"]
ENTRYPOINT ["baton", "serve", "decode"]
CMD ["--host", "0.0.0.0", "--model", "/models/baton-tiny"]
