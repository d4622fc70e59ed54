# The fine-tuning service. On a CPU:     docker build -t deltaguard .
# On GPUs of NVIDIA, with CUDA 12.8:     docker build -t deltaguard --build-arg TORCH=cu128 .
FROM python:3.12-slim-bookworm

# Which build of torch: `cpu`, or one of CUDA, whose libraries come with it; the host needs the driver alone.
ARG TORCH=cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/data/hub

# Before the sources: a change of them does not fetch torch again.
RUN pip install --index-url "https://download.pytorch.org/whl/${TORCH}" "torch>=2.9"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install ".[serve,s3]" && rm -rf /src/*

RUN useradd --uid 10001 --create-home deltaguard && install -d -o deltaguard /data
USER deltaguard
WORKDIR /data
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]

ENTRYPOINT ["deltaguard"]
CMD ["serve", "--data", "/data", "--host", "0.0.0.0", "--port", "8000"]
