"""Checkpoints of logical tensors: written by any layout, read by any other."""

from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.engine import load, save
from rdm_scale.checkpoint.model import TrainedModel, load_model, load_trained

__all__ = ["CheckpointDirectory", "TrainedModel", "load", "load_model", "load_trained", "save"]
