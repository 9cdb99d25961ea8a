"""Whether the data that a configuration names fit the model that it describes; checked before anything is built."""

from rdm_scale.config import ModelConfig, RunConfig
from rdm_scale.data.manifest import Manifest, read_manifest
from rdm_scale.errors import DataError


def check_data(config: RunConfig) -> dict[str, str]:
    """Reads the manifests of `data.train` and `data.validation` and returns the identity of the training data.

    Raises:
        DataError: a manifest is missing or damaged, or its latents, classes or codec do not fit.
    """
    train, _ = read_manifest(config.data.train)
    _check_model(config.model, train, "data.train")
    if config.data.validation is not None:
        validation, _ = read_manifest(config.data.validation)
        _check_model(config.model, validation, "data.validation")
        if validation.codec != train.codec:
            raise DataError(
                f"data.validation={config.data.validation} was encoded by codec {validation.codec.name} and "
                f"data.train={config.data.train} by {train.codec.name}, or with other weights or scale: "
                "encode both with the same codec"
            )
    return {"train": train.digest}


def _check_model(model: ModelConfig, manifest: Manifest, key: str) -> None:
    expected = (model.input.channels, model.input.frames, model.input.height, model.input.width)
    if manifest.shape != expected:
        c, t, h, w = manifest.shape
        raise DataError(
            f"{key} holds latents of shape [C, T, H, W] = {list(manifest.shape)}, the configuration expects "
            f"{list(expected)}: set model.input to channels {c}, frames {t}, height {h}, width {w}, "
            "or encode the data at another size"
        )
    classes = len(manifest.class_names)
    if model.condition == "class" and classes != model.num_classes:
        raise DataError(
            f"{key} has {classes} classes and model.num_classes={model.num_classes}: set model.num_classes={classes}"
            if classes
            else f"{key} has no labels: set model.condition=none, or encode data with labels"
        )
