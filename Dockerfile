# Training on NVIDIA GPUs, with NVIDIA apex and DeepSpeed's kernels prebuilt.
#
# Tested: the Python part (constraints, package, commands), which `make` installs on CPUs. Not tested: the image as a
# whole. Continuous integration has neither Docker nor a GPU; the CUDA base, the apex build and the DeepSpeed kernels
# follow their projects' instructions. Try it on a GPU machine first:
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
# The version of torch that the adapters are tested with. For another CUDA than that of pip's default build, name the
# index of PyTorch that has it.
COPY constraints.txt setup.py pyproject.toml README.md LICENSE ./
RUN pip install torch==2.13.0

# FusedAdam. Optional: without it rdm_scale uses PyTorch's fused AdamW. PyPI's `apex` is an unrelated package.
ARG APEX_VERSION=25.09
ENV TORCH_CUDA_ARCH_LIST="8.0;9.0"
RUN git clone --depth 1 --branch ${APEX_VERSION} https://github.com/NVIDIA/apex /tmp/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation /tmp/apex \
    && rm -r /tmp/apex

COPY configs configs
COPY tools tools
COPY rdm_scale rdm_scale
# Build DeepSpeed's kernels now; otherwise the first training step compiles them.
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && DS_BUILD_FUSED_ADAM=1 pip install --no-build-isolation -c /tmp/constraints.txt deepspeed==0.19.8 \
    && pip install -c /tmp/constraints.txt .
COPY launch launch
CMD ["python", "-m", "rdm_scale.train", "--help"]
