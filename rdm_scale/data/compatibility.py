"""Whether the data that a configuration names fit the model that it describes; checked before anything is built."""

from dataclasses import dataclass
from typing import Any

from rdm_scale.config import DataSource, ModelConfig, RunConfig
from rdm_scale.data.manifest import Codec, Manifest, read_manifest
from rdm_scale.errors import DataError


@dataclass(frozen=True)
class DataFacts:
    """What a run has to know of its data beside the samples.

    `identity` is what a resumed run must agree on.
    """

    identity: dict[str, Any]
    codec: Codec
    class_names: tuple[str, ...]


def check_data(config: RunConfig) -> DataFacts:
    """Reads the manifests of `data.train` and `data.validation`.

    Raises:
        DataError: a manifest is missing or damaged, or its latents, classes or codec do not fit.
    """
    train = [_checked(config, source, "data.train") for source in config.data.train]
    first = train[0]
    for key, sources in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        for source in sources:
            manifest = _checked(config, source, key)
            if manifest.codec != first.codec:
                raise DataError(
                    f"{key}={source.path} was encoded by codec {manifest.codec.name} and data.train="
                    f"{config.data.train[0].path} by {first.codec.name}, or with other weights or scale: "
                    "encode both with the same codec"
                )
            if config.model.condition == "class" and manifest.class_names != first.class_names:
                raise DataError(
                    f"{key}={source.path} and data.train={config.data.train[0].path} name their classes differently, "
                    f"{_few(manifest.class_names)} and {_few(first.class_names)}: encode them from inputs with the "
                    "same classes"
                )
    several = [[manifest.digest, source.weight] for manifest, source in zip(train, config.data.train, strict=True)]
    return DataFacts({"train": first.digest if len(train) == 1 else several}, first.codec, first.class_names)


def _checked(config: RunConfig, source: DataSource, key: str) -> Manifest:
    manifest, _ = read_manifest(source.path, config.data.options)
    _check_model(config.model, manifest, key)
    return manifest


def _check_model(model: ModelConfig, manifest: Manifest, key: str) -> None:
    expected = (model.input.channels, model.input.frames, model.input.height, model.input.width)
    for shape in manifest.buckets:
        if shape != expected:
            c, t, h, w = shape
            raise DataError(
                f"{key} holds latents of shape [C, T, H, W] = {list(shape)}, the configuration expects "
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


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
