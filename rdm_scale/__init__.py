"""Distributed pretraining of Neural Residual Diffusion Models (Neural-RDM, arXiv 2406.13215)."""

from rdm_scale import moved

__version__ = "0.1.0"

moved.install()
