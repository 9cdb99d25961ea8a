"""Measures of the model in training: samples of its EMA weights, drawn and measured by all ranks.

Shapes: B samples of a batch, N samples, C channels, T frames, H height, W width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from rdm_scale.codecs import codec_of
from rdm_scale.config import RunConfig
from rdm_scale.config.schema import OBJECTIVE_SAMPLERS
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.diffusion.samplers import Model
from rdm_scale.errors import ConfigError
from rdm_scale.evaluation.measurements import Measurement, check_comparable, measure, wanted_for
from rdm_scale.evaluation.networks.named_networks import load_network
from rdm_scale.evaluation.reference_file import read_reference
from rdm_scale.evaluation.sample_sets import PixelSize, to_uint8
from rdm_scale.evaluation.set_statistics import SetIdentity, StatisticsCollector
from rdm_scale.sampling.generate import draw_latents

if TYPE_CHECKING:
    from rdm_scale.parallel.mesh import Mesh  # megatron-core takes seconds to import

SEED = 0  # of the samples: the same noise at every call and in every run


class TrainingMeasure:
    """Frechet distance, and KID if the reference holds features, of samples of the model in training.

    The data-parallel ranks divide the samples; noise and label of a sample depend on its index only, and nothing is
    drawn from the generators of training. One rank of each model replica decodes and measures. Codec and network are
    loaded on construction, so that a reference that does not fit stops the run before it starts.

    Raises:
        ConfigError: the reference is of another network, size or preprocessing, or its network is not installed.
        DataError: the reference cannot be read.
    """

    def __init__(self, config: RunConfig, mesh: "Mesh", facts: DataFacts) -> None:
        assert config.monitor.reference is not None
        self.config, self.mesh = config, mesh
        self.reference = read_reference(config.monitor.reference)
        if self.reference.identity is None:
            raise ConfigError(
                f"monitor.reference={config.monitor.reference} does not say its network: write it with "
                "tools/measure.py reference"
            )
        self.codec = codec_of(facts.codec, mesh.device if mesh.reads_data else "cpu")
        geometry, size = self.codec.geometry, config.model.input
        height, width = size.height * geometry.spatial, size.width * geometry.spatial
        frames = geometry.frames(size.frames)
        self.metrics = ["fvd" if frames > 1 else "fid", *(["kid"] if self.reference.features is not None else [])]
        self.network = load_network(self.reference.option, frames, mesh.device if mesh.reads_data else "cpu")
        self.wanted = wanted_for(self.metrics, self.network)
        self.identity = SetIdentity.of(self.network, PixelSize(frames, height, width))
        check_comparable(self.reference, self.identity, "the model in training")

    def measure(self, model: Model, step: int, progress: Callable[[int, int], None] | None = None) -> list[Measurement]:
        """Draw and measure samples of `model`; the same result on every rank. Collective."""
        collector = StatisticsCollector(self.network.width, self.wanted)
        count, batch_size = self.config.monitor.measure_samples, self._batch_size()
        stride = batch_size * self.mesh.data_size
        # All ranks take part in every forward; samples beyond the last are drawn and dropped.
        for first in range(self.mesh.data_rank * batch_size, -(-count // stride) * stride, stride):
            indices = torch.arange(first, first + batch_size)
            labels = indices % max(1, self.config.model.num_classes)
            on_device = labels.to(self.mesh.device)
            latents = draw_latents(model, self.config, on_device, SEED, first_index=first, progress=progress)
            wanted = int((indices < count).sum())
            if self.mesh.reads_data and wanted:
                pixels = to_uint8(self.codec.decode(latents[:wanted]).cpu())
                collector.add(indices[:wanted], self.network.extract(pixels))
        generated = collector.result("the model in training", self.identity, mesh=self.mesh)
        found = None
        if self.mesh.is_first:  # decompositions take seconds of all cores: once on a node, not once a rank
            found = measure(self.metrics, self.reference, generated, context=self._context(step))
        return self.mesh.broadcast(found)

    def _batch_size(self) -> int:
        """Samples of a rank in one forward: those of a micro-batch of training, which fit its memory."""
        share = self.config.train.global_batch_size // self.mesh.data_size
        return min(self.config.train.micro_batch_size or share, self.config.monitor.measure_samples)

    def _context(self, step: int) -> dict[str, object]:
        sampling, objective = self.config.sampling, self.config.diffusion.objective
        return {
            "step": step,
            "weights": "ema",
            "sampler": sampling.sampler or OBJECTIVE_SAMPLERS[objective][0],
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "seed": SEED,
        }
