"""Check that the data sets of a configuration fit its model, before anything is built."""

from collections.abc import Iterator
from dataclasses import dataclass

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import DataSource, ModelConfig, RunConfig
from rdm_scale.data.manifest import Manifest, Shape, TextEncoding, read_manifest
from rdm_scale.errors import DataError


@dataclass(frozen=True)
class DataFacts:
    """Properties of the data that a run needs besides the samples.

    Attributes:
        identity: digests of the training data sets (with weights, if several), which must not change on resume.
        text: encoding of the captions, for models conditioned on text.
        warnings: one line for each reason to doubt what is measured on the data.
    """

    identity: dict[str, str | list[list[str | float]]]
    codec: CodecRecord
    class_names: tuple[str, ...]
    text: TextEncoding | None = None
    warnings: tuple[str, ...] = ()


def check_data(config: RunConfig) -> DataFacts:
    """Read the manifests of `data.train` and `data.validation` and check them against the configuration.

    Raises:
        DataError: a manifest is missing or damaged, or its latents, classes or codec do not fit.
    """
    train = [_read(config, source) for source in config.data.train]
    validation = [_read(config, source) for source in config.data.validation]
    shapes = {shape for manifest in train for shape in manifest.buckets}
    first, where = train[0], config.data.train[0].path
    for key, sources, manifests in (
        ("data.train", config.data.train, train),
        ("data.validation", config.data.validation, validation),
    ):
        for source, manifest in zip(sources, manifests, strict=True):
            _check_shapes(config, manifest, key, shapes if len(shapes) > 1 else set())
            _check_classes(config.model, manifest, key)
            _check_text(config.model, manifest, first, key)
            if manifest.codec != first.codec:
                raise DataError(
                    f"{key}={source.path} was encoded by codec {manifest.codec.name} and data.train={where} by "
                    f"{first.codec.name}, or with other weights or normalization: encode both with the same codec"
                )
            if config.model.condition == "class" and manifest.class_names != first.class_names:
                raise DataError(
                    f"{key}={source.path} and data.train={where} name their classes differently, "
                    f"{_few(manifest.class_names)} and {_few(first.class_names)}: encode them from inputs with the "
                    "same classes"
                )
    weighted: list[list[str | float]] = [
        [manifest.digest, source.weight] for manifest, source in zip(train, config.data.train, strict=True)
    ]
    text = first.text if config.model.condition == "text" else None
    identity = {"train": first.digest if len(train) == 1 else weighted}
    return DataFacts(identity, first.codec, first.class_names, text, tuple(_overlaps(config, train, validation)))


def _overlaps(config: RunConfig, train: list[Manifest], validation: list[Manifest]) -> Iterator[str]:
    """Warn of validation sets with shards that are trained on, by the checksums of the shards."""
    trained = {shard.sha256 for manifest in train for shard in manifest.shards}
    for source, manifest in zip(config.data.validation, validation, strict=True):
        shared = sum(shard.samples for shard in manifest.shards if shard.sha256 in trained)
        if shared:
            yield (
                f"data.validation={source.path} shares {shared:,} of its {sum(s.samples for s in manifest.shards):,} "
                "samples with data.train: the validation loss does not show how the model does on other data"
            )


def _read(config: RunConfig, source: DataSource) -> Manifest:
    return read_manifest(source.path, config.data.options)[0]


def _check_shapes(config: RunConfig, manifest: Manifest, key: str, training: set[Shape]) -> None:
    """Check that samples have the configured shape, or one of the training shapes if these include it.

    Args:
        training: shapes of the training data, if there are several.
    """
    size = config.model.input
    expected = (size.channels, size.frames, size.height, size.width)
    for shape in manifest.buckets:
        if shape == expected or (expected in training and shape in training):
            _check_bucket(config, shape, key)
            continue
        c, t, h, w = shape
        raise DataError(
            f"{key} holds latents of shape [C, T, H, W] = {list(shape)}, the configuration expects "
            f"{list(expected)}: set model.input to channels {c}, frames {t}, height {h}, width {w}, "
            "or encode the data at another size"
        )


def _check_bucket(config: RunConfig, shape: Shape, key: str) -> None:
    """Check that the model can take samples of one of several sizes."""
    model, parallel = config.model, config.parallel
    for name, size, patch in zip(("frames", "height", "width"), shape[1:], model.patch_size, strict=True):
        if size % patch:
            raise DataError(
                f"{key} holds latents of shape {list(shape)}, whose {name} {size} is not divisible by its "
                f"model.patch_size entry {patch}: change model.patch_size, or encode other buckets"
            )
    if model.input.frames == 1 and shape[1] > 1:
        raise DataError(f"{key} holds clips of {shape[1]} latent frames: set model.input.frames to the longest")
    tokens = model.tokens_of(shape[1:])
    if parallel.sequence and tokens % parallel.tensor:
        raise DataError(
            f"{key} holds latents of shape {list(shape)}, whose {tokens} tokens parallel.tensor={parallel.tensor} does "
            "not divide: set parallel.sequence=false, or encode other buckets"
        )


def _check_classes(model: ModelConfig, manifest: Manifest, key: str) -> None:
    classes = len(manifest.class_names)
    if model.condition == "class" and classes != model.num_classes:
        raise DataError(
            f"{key} has {classes} classes and model.num_classes={model.num_classes}: set model.num_classes={classes}"
            if classes
            else f"{key} has no labels: set model.condition=none, or encode data with labels"
        )


def _check_text(model: ModelConfig, manifest: Manifest, first: Manifest, key: str) -> None:
    if model.condition != "text":
        return
    text = manifest.text
    if text is None:
        raise DataError(
            f"{key} has no captions: encode data with captions (--text-encoder), or set model.condition=none"
        )
    if (text.width, text.pooled_width) != (model.text.width, model.text.pooled_width):
        raise DataError(
            f"{key} has captions of width {text.width} and pooled width {text.pooled_width}: set model.text.width="
            f"{text.width} and model.text.pooled_width={text.pooled_width}"
        )
    if first.text is None or (text.digest, text.empty) != (first.text.digest, first.text.empty):
        raise DataError(
            f"{key} has captions of another text encoder than the first data set: encode all with the same encoder"
        )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
