"""Old import paths of public names, kept working with a DeprecationWarning.

`from rdm_scale.data.images import decode` names a module that no longer exists. The import hook installed here supplies
one that looks its names up in the modules that hold them now, and imports those on first use.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module: the modules that hold its content now. All paths are relative to rdm_scale.
MODULES: dict[str, tuple[str, ...]] = {
    "checkpoint.diffusers": ("checkpoint.convert.parameter_mapping", "checkpoint.convert.diffusers_config"),
    "checkpoint.growth": ("checkpoint.convert.grow",),
    "checkpoint.importing": ("checkpoint.convert.import_weights",),
    "checkpoint.inspection": ("checkpoint.summary", "checkpoint.verify"),
    "checkpoint.merge": ("checkpoint.convert.merge",),
    "checkpoint.model": ("checkpoint.trained_model",),
    "checkpoint.pipeline": ("sampling.rdm_pipeline",),
    "data.cache": ("storage.cache",),
    "data.codecs": ("codecs",),
    "data.codecs.codec": ("codecs.codec",),
    "data.codecs.loading": ("codecs.registry",),
    "data.encoding": ("encoding",),
    "data.encoding.inspection": ("encoding.inspection",),
    "data.encoding.job": ("encoding.job", "encoding.runner"),
    "data.encoding.planning": ("encoding.planning",),
    "data.images": ("encoding.images", "encoding.inputs"),
    "data.inputs": ("encoding.inputs",),
    "data.lists": ("encoding.lists",),
    "data.media": ("encoding.media",),
    "data.reader": ("data.contiguous_reader", "data.dataset"),
    "data.retry": ("storage.retries", "storage.context"),
    "data.s3": ("storage.s3_client",),
    "data.storage": ("storage.location",),
    "data.videos": ("encoding.videos",),
    "diffusion.schedule": ("diffusion.noise_schedule",),
    "evaluation.pictures": ("sampling.image_grid", "evaluation.plots"),
    "evaluation.sampling": ("sampling.generate",),
    "models.init": ("models.initialization",),
    "parallel.layout": ("parallel.plan",),
}
# Module that still exists: the names that were moved out of it, and the module that holds each now.
NAMES: dict[str, dict[str, str]] = {
    "config": {"Among": "config.model"},
    "data.captions": {"TextEncoder": "encoding.text", "encode_prompts": "encoding.text"},
    "data.manifest": {"Codec": "codecs.record"},
    "data.prefetch": {"TrainingBatch": "batch", "draw": "diffusion.training_draws"},
    "data.shards": dict.fromkeys(
        ("PackedMember", "ShardWriter", "check_samples", "pack_samples", "sample_id", "write_tar"), "data.shard_writer"
    ),
    "data.stream": {"LatentBatch": "batch", "HeldOut": "data.held_out"},
    "evaluation": dict.fromkeys(("animated_grid", "image_grid", "write_grid"), "sampling.image_grid"),
    "models": {"Part": "models.transformer"},
}
# Old module: the names in it that have another name now.
RENAMED: dict[str, dict[str, str]] = {
    "config": {"Among": "AttentionScope"},
    "data.codecs": {"Codec": "CodecRecord", "denormalise": "denormalize", "normalise": "normalize"},
    "data.codecs.codec": {"Codec": "CodecRecord", "denormalise": "denormalize", "normalise": "normalize"},
    "data.encoding.planning": {"Bucket": "PixelBucket", "Settings": "EncodingSettings"},
    "data.inputs": {"Kind": "MediaKind"},
    "data.manifest": {"Codec": "CodecRecord"},
    "data.media": {"Kind": "MediaKind"},
    "data.s3": {"S3": "S3Client"},
    "data.videos": {"VideoSize": "VideoMetadata", "probe_video": "read_video_metadata"},
    "models": {"Part": "ModelPart"},
    "models.init": {"initialise": "initialize"},
    "parallel.layout": {"Layout": "ParallelPlan", "plan": "plan_parallelism"},
}
_ROOT = "rdm_scale."


def install() -> None:
    """Make the old module paths importable."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())


def moved_names(module: str) -> Callable[[str], Any]:
    """A module-level `__getattr__` for an existing module that some public names have left."""
    homes = NAMES[module.removeprefix(_ROOT)]

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return _moved(module, name, [homes[name]])

    return find


class _MovedModules(MetaPathFinder, Loader):
    """Finds modules under their old names, after every other finder has failed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        old = name.removeprefix(_ROOT)
        return ModuleSpec(name, self, is_package=True) if name.startswith(_ROOT) and old in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        homes = MODULES[module.__name__.removeprefix(_ROOT)]
        module.__doc__ = f"Moved to {' and '.join(_ROOT + home for home in homes)}."
        module.__dict__["__getattr__"] = lambda name: _moved(module.__name__, name, homes)


def _moved(module: str, name: str, homes: Sequence[str]) -> Any:
    """The value of a moved name, found in the first of its new homes that has it."""
    if not name.startswith("__"):
        new = RENAMED.get(module.removeprefix(_ROOT), {}).get(name, name)
        for home in homes:
            found = importlib.import_module(_ROOT + home)
            if hasattr(found, new):
                text = f"{module}.{name} has moved: import {new} from {_ROOT}{home}"
                warnings.warn(text, DeprecationWarning, stacklevel=3)
                return getattr(found, new)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
