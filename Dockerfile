# The three commands on a CPU: docker build -t moe-offload-lab . && docker run --rm moe-offload-lab moesim compare lru lfu
# About 3 GB. See docs/installing.md.
FROM python:3.12-slim

# hqq, a source distribution, tries to build CUDA kernels unless told not to; nothing here uses them.
ENV DISABLE_CUDA=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
    NUMBA_CACHE_DIR=/opt/compiled \
    PYTHONUTF8=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY traces traces
COPY policies policies
COPY simulator simulator
COPY runtime runtime
COPY tracer tracer
RUN pip install -c constraints.txt '.[run,serve,guided,plots]' && rm -rf /src/*

# Compiled once, for every user of the image.
RUN python -m moesim.ahead && chmod -R a+rwX /opt/compiled

RUN useradd --create-home user
USER user
WORKDIR /home/user
EXPOSE 8000
CMD ["moesim", "compare", "lru", "lfu", "belady"]
