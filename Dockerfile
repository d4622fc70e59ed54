# The fine-tuning service: docker build -t deltaguard .
# As it is, torch brings the libraries of CUDA, and runs on a CPU as well; without them the image is a fraction of
# the size: --build-arg TORCH_INDEX=ADDRESS, the one that pytorch.org names for builds for CPUs.
FROM python:3.12-slim-bookworm

# Where another build of torch comes from than the default one, for CPUs or another CUDA; the host needs the driver alone.
ARG TORCH_INDEX=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/data/hub

# Before the sources: a change of them does not fetch torch again.
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.9"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# Of one version, which the sources are; what they need has the ranges that they state.
# hadolint ignore=DL3013
RUN pip install ".[serve,s3]" && rm -rf /src/*

RUN useradd --uid 10001 --create-home deltaguard && install -d -o deltaguard /data
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]

ENTRYPOINT ["deltaguard"]
CMD ["serve", "--data", "/data", "--host", "0.0.0.0", "--port", "8000"]
