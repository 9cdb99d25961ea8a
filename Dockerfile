# Training on NVIDIA GPUs, with NVIDIA apex and DeepSpeed's kernels built in.
#
# What was checked and what was not: the Python part (constraints, package, entry points) is what `make` installs and
# tests on CPUs. This image itself has not been built by the project's continuous integration, which has neither
# Docker nor a GPU; the CUDA base, the apex build and the DeepSpeed kernels are written after their projects'
# instructions and have to be tried on a GPU machine first:
#
#   docker build -t rdm_scale .
#   docker run --gpus all --ipc=host -v "$PWD/data:/work/data" -v "$PWD/runs:/work/runs" rdm_scale \
#       torchrun --standalone --nproc_per_node 8 -m rdm_scale.train configs/dit_xl.yaml
FROM nvidia/cuda:12.8.1-devel-ubuntu22.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv git ninja-build g++ make openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*
RUN python3.11 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /work
# constraints.txt pins the CPU build of torch by its version alone; the index below serves the CUDA build of it.
COPY constraints.txt setup.py pyproject.toml README.md LICENSE ./
RUN pip install torch==2.13.0

# FusedAdam (optional; rdm_scale falls back to PyTorch's fused AdamW). PyPI's `apex` is another package.
ARG APEX_VERSION=25.09
ENV TORCH_CUDA_ARCH_LIST="8.0;9.0"
RUN git clone --depth 1 --branch ${APEX_VERSION} https://github.com/NVIDIA/apex /tmp/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation /tmp/apex \
    && rm -r /tmp/apex

COPY configs configs
COPY tools tools
COPY rdm_scale rdm_scale
# No kernel is compiled at the first step: what DeepSpeed would build then is built here.
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && DS_BUILD_FUSED_ADAM=1 pip install --no-build-isolation -c /tmp/constraints.txt deepspeed==0.19.8 \
    && pip install -c /tmp/constraints.txt .
COPY launch launch
CMD ["python", "-m", "rdm_scale.train", "--help"]
