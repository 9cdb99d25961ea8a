"""Distributed pretraining of Neural Residual Diffusion Models (Neural-RDM, arXiv 2406.13215)."""

__version__ = "0.1.0"
