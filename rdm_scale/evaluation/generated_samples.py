"""Features of samples drawn from a trained model, on any number of ranks, kept in files so that a killed job goes on.

Samples are drawn in chunks of consecutive indices; ranks take those that are missing in turns, and each chunk is
written to a file of its own. Noise and condition of a sample depend on the seed and its index only, so neither the
number of ranks nor an interruption changes the samples.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from rdm_scale.checkpoint.trained_model import TrainedModel
from rdm_scale.codecs import LatentCodec, codec_of
from rdm_scale.conditions import select_conditions
from rdm_scale.config import RunConfig
from rdm_scale.errors import ConfigError, DataError
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork, Features
from rdm_scale.evaluation.reference_file import write_arrays
from rdm_scale.evaluation.sample_sets import PixelSize, to_uint8
from rdm_scale.evaluation.set_statistics import (
    SetIdentity,
    SetStatistics,
    StatisticsCollector,
    Wanted,
    caption_scores,
)
from rdm_scale.sampling.generate import draw_latents
from rdm_scale.sampling.requests import (
    SamplingRequest,
    request_labels,
    request_prompts,
    request_unconditional,
)
from rdm_scale.storage.location import Location

if TYPE_CHECKING:
    from rdm_scale.parallel.mesh import Mesh

_KEY_CHARACTERS = 16


@dataclass(frozen=True)
class GenerationPlan:
    """Everything on which the drawn samples and their features depend.

    Attributes:
        model: path of the checkpoint.
        step, weights: which weights of it.
        config: digest of the run's configuration.
        parameters: digest of these weights: a run or folder may have been made anew.
        condition: the conditions of the samples, in words.
        names: digest of the prompts or the names of the classes.
        samples: number of samples.
        sampler, steps, guidance, seed: of sampling.
        identity: of the feature network.
        chunk: samples of a file, which are one batch.
        pixels: True: the pixels are kept, too.
    """

    model: str
    step: int
    weights: str
    config: str
    parameters: str
    condition: str
    names: str
    samples: int
    sampler: str
    steps: int
    guidance: float
    seed: int
    identity: SetIdentity
    chunk: int
    pixels: bool

    @property
    def key(self) -> str:
        """Name of the folder of these samples: another plan has another one."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:_KEY_CHARACTERS]

    @property
    def chunks(self) -> int:
        """Number of files."""
        return -(-self.samples // self.chunk)

    def indices(self, chunk: int) -> range:
        """Indices of the samples of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.samples))

    def fields(self) -> dict[str, Any]:
        """Fields of a measurement."""
        names = ("model", "step", "weights", "condition", "sampler", "steps", "guidance", "seed")
        return {name: getattr(self, name) for name in names}


class GeneratedSamples:
    """Samples of a plan in a folder, drawn as far as the folder has them.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, plan: GenerationPlan, folder: Location, mesh: "Mesh | None" = None) -> None:
        self.plan, self.folder, self.mesh = plan, folder / plan.key, mesh
        try:
            self.folder.make_dir()
        except OSError as error:
            raise DataError(f"cannot make the folder {self.folder}: {error}; choose another with --output") from None

    def missing(self) -> list[int]:
        """Chunks that have no file yet; the same on all ranks. Collective with a mesh."""
        names = set(self.folder.names())
        found = [number for number in range(self.plan.chunks) if _file_name(number) not in names]
        return found if self.mesh is None else self.mesh.broadcast(found)

    def draw(
        self,
        trained: TrainedModel,
        config: RunConfig,
        request: SamplingRequest,
        network: FeatureNetwork,
        progress: Callable[[int], object] = lambda done: None,
    ) -> None:
        """Draw the samples that are missing and write their features. Collective with a mesh.

        Args:
            request: conditions of at least as many samples.
            progress: called with the number of samples that exist, about.

        Raises:
            DataError: a pixel or feature is not finite, or a file cannot be written.
        """
        codec = codec_of(trained.codec, network.device)
        rank, ranks = (self.mesh.rank, self.mesh.world_size) if self.mesh else (0, 1)
        missing = self.missing()
        done = self.plan.samples - sum(len(self.plan.indices(chunk)) for chunk in missing)
        progress(done)
        for chunk in missing[rank::ranks]:
            indices = self.plan.indices(chunk)
            pixels = _draw(trained, config, request, codec, self.plan.seed, indices)
            self._write(chunk, network.extract(pixels), pixels)
            done += len(indices) * ranks
            progress(min(done, self.plan.samples))
        if self.mesh is not None:
            self.mesh.all_reduce_sum([0.0])  # all chunks exist now

    def statistics(
        self, wanted: Wanted, network: FeatureNetwork, option: str, captions: Sequence[str] | None = None
    ) -> SetStatistics:
        """Statistics of all samples, read in their order, so that they do not depend on who drew them.

        Args:
            option: `--features` that loads the network again.
            captions: of the samples in turns, for CLIP scores.
        """
        collector = StatisticsCollector(network.width, wanted, network.spatial_width)
        for number in range(self.plan.chunks):
            arrays = self._read(number)
            parts = {name: torch.from_numpy(arrays[name]) for name in Features._fields if name in arrays}
            indices, features = torch.tensor(self.plan.indices(number)), Features(**parts)
            scores = caption_scores(network, features, indices, captions) if wanted.captions else None
            collector.add(indices, features, caption_scores_B=scores)
        return collector.result(self.plan.model, self.plan.identity, option=option)

    def pixels(self) -> Iterator[np.ndarray]:
        """Pixels uint8 [B, T, H, W, 3] of each chunk, if the plan keeps them."""
        for number in range(self.plan.chunks):
            yield self._read(number)["pixels"]

    def _write(self, chunk: int, features: Features, pixels: Tensor) -> None:
        arrays = {name: part.numpy() for name, part in features._asdict().items() if part is not None}
        if self.plan.pixels:
            arrays["pixels"] = pixels.numpy()
        try:
            write_arrays(self.folder / _file_name(chunk), **arrays)
        except DataError as error:
            raise DataError(f"{error}; the same command goes on with the samples that it has") from None

    def _read(self, chunk: int) -> dict[str, np.ndarray]:
        file = self.folder / _file_name(chunk)
        try:
            with file.open() as content, np.load(content, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{file} is damaged: {error}; remove it and run the same command again") from None


def conditions_in_turns(
    trained: TrainedModel, samples: int, prompts_file: str | None = None, text_encoder: str | None = None
) -> tuple[SamplingRequest, str]:
    """Conditions of at least this many samples, all classes or prompts in turns, and a description of them.

    Args:
        prompts_file: for a model with text, a file on any fsspec file system with one prompt a line.
        text_encoder: its folder; None: where it was when the captions were encoded.

    Raises:
        ConfigError: a model with text and no prompts.
    """
    model = trained.config.model
    if model.condition == "none":
        return request_unconditional(1, samples), "none"
    if model.condition == "class":
        classes = model.num_classes
        return request_labels(trained, range(classes), -(-samples // classes)), f"{classes} classes in turns"
    if prompts_file is None:
        raise ConfigError("the model takes captions: give --prompts FILE, one a line")
    try:
        lines = Location(prompts_file).read().decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts {prompts_file}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    request = request_prompts(trained, prompts, -(-samples // max(1, len(prompts))), text_encoder)
    return request, f"{len(prompts)} prompts of {prompts_file} in turns"


def digest_of_parameters(model: nn.Module) -> str:
    """Hash of a model's parameters by name and value, the same on every device."""
    found = xxhash.xxh3_128()
    for name, p in model.named_parameters():
        found.update(name.encode())
        found.update(p.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def digest_of_names(names: Sequence[str]) -> str:
    """Digest of prompts or names of classes."""
    return xxhash.xxh3_128_hexdigest(json.dumps(list(names)).encode())


def pixel_size(trained: TrainedModel) -> PixelSize:
    """Frames, height and width of what a model draws."""
    size = trained.config.model.input
    geometry = codec_of(trained.codec, "cpu").geometry
    return PixelSize(geometry.frames(size.frames), size.height * geometry.spatial, size.width * geometry.spatial)


def _file_name(chunk: int) -> str:
    return f"chunk-{chunk:06d}.npz"


def _draw(
    trained: TrainedModel, config: RunConfig, request: SamplingRequest, codec: LatentCodec, seed: int, indices: range
) -> Tensor:
    """Pixels uint8 [B, T, H, W, 3] of the samples with these indices."""
    device = next(trained.model.parameters()).device
    condition = select_conditions(request.condition, slice(indices.start, indices.stop)).to(device)
    latents = draw_latents(
        trained.model, config, condition, seed, empty_caption=request.empty_caption, first_index=indices.start
    )
    return to_uint8(codec.decode(latents).cpu())
