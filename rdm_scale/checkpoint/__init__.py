"""Checkpoints of logical tensors: written by any layout, read by any other."""

from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.saver import Saver
from rdm_scale.checkpoint.sharded_state import load
from rdm_scale.checkpoint.trained_model import TrainedModel, load_model, load_trained

__all__ = ["CheckpointDirectory", "Saver", "TrainedModel", "load", "load_model", "load_trained"]
