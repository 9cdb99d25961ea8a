"""Loading of a trained model onto one process, for sampling and tools."""

from dataclasses import dataclass

import torch

from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import RunConfig, Weights, WeightsName
from rdm_scale.data.manifest import TextEncoding
from rdm_scale.models import DiffusionTransformer, build_model


@dataclass(frozen=True)
class TrainedModel:
    """A model and what is needed to use it."""

    model: DiffusionTransformer
    config: RunConfig
    step: int
    codec: CodecRecord
    class_names: tuple[str, ...]
    text: TextEncoding | None  # encoding of the captions that it was trained on
    weights: Weights = "ema"


def load_model(path: str, weights: WeightsName | None = None) -> DiffusionTransformer:
    """Load the model of a checkpoint or merged folder in fp32, ready for sampling; see `load_trained`."""
    return load_trained(path, weights).model


def load_trained(path: str, weights: WeightsName | None = None, device: str | torch.device = "cpu") -> TrainedModel:
    """Load the model of a checkpoint or merged folder in fp32, with its configuration, codec and class names.

    Args:
        path: a checkpoint's folder, a run's directory or a folder of checkpoints (the newest one is used), or a folder
            that tools/merge_checkpoint.py wrote; a local path or any fsspec URL.
        weights: the EMA weights (ema), or those without averaging (raw, also called weights). None: the EMA weights,
            or those that a merged folder has.
        device: device of the model.

    Raises:
        CheckpointError: there is no complete checkpoint, it is damaged or was not written by this project, or a merged
            folder has other weights.
    """
    source = open_model(path, weights)
    with torch.device("meta"):
        model = build_model(source.config.model)
    model.to_empty(device=device)
    model.set_positions(torch.device(device))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in source.stream():
            parameters[name].copy_(tensor)
    model.eval().requires_grad_(False)
    return TrainedModel(
        model, source.config, source.step, source.codec, source.class_names, source.text, source.weights
    )
