# The server in a container with NVIDIA GPUs. Build and run:
#
#     docker build -t tpllm .
#     docker run --gpus all --ipc=host -p 8000:8000 -e TPLLM_API_KEY=secret \
#         -v ~/.cache/huggingface:/home/tpllm/.cache/huggingface tpllm --model Qwen/Qwen3-8B
#
# --ipc=host: NCCL needs more shared memory than the 64 MB that a container has.
FROM python:3.12-slim-bookworm

# Triton compiles each kernel's launcher with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 1000 --create-home tpllm
WORKDIR /home/tpllm

COPY --chown=tpllm . source/
RUN pip install --no-cache-dir --constraint source/constraints-cpu.txt './source[server,structured]' \
    && rm -rf source

USER 1000
ENV TPLLM_HOST=0.0.0.0
EXPOSE 8000
# A large model needs minutes to load its weights.
HEALTHCHECK --start-period=15m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["tpllm", "serve"]
