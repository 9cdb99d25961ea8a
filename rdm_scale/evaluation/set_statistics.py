"""Statistics of a set of samples in the features of one network, with the identity that decides what may be compared.

Shapes: N samples, n of them whose features are kept, D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from rdm_scale.errors import ConfigError, DataError
from rdm_scale.evaluation.feature_moments import FeatureMoments, Gaussian
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork, Features
from rdm_scale.evaluation.networks.named_networks import IDENTITY
from rdm_scale.evaluation.sample_sets import PixelSize, SampleSet, kept_rows

if TYPE_CHECKING:
    from rdm_scale.parallel.mesh import Mesh  # megatron-core takes seconds to import

ROUNDED = "uint8"  # quantization of pixels, that of image files


@dataclass(frozen=True)
class SetIdentity:
    """Network, preprocessing and size of pixels: sets in which one of these differs cannot be compared.

    Attributes:
        network: name of the feature network.
        network_sha256: of its weights; empty without weights.
        resize: how pixels were brought to the network's size.
        quantization: of pixels before that.
        frames, height, width: of samples; 0 for features that were given as arrays.
    """

    network: str
    network_sha256: str
    resize: str
    quantization: str
    frames: int
    height: int
    width: int

    @staticmethod
    def of(network: FeatureNetwork, size: PixelSize) -> "SetIdentity":
        own = network.identity
        return SetIdentity(own.name, own.digest, own.resize, ROUNDED, *size)

    def check_comparable(self, other: "SetIdentity", name: str, other_name: str) -> None:
        """Raise ConfigError, naming each difference, unless sets of the two identities can be compared."""
        own, others = asdict(self), asdict(other)
        differences = [f"{key} {own[key]} against {others[key]}" for key in own if own[key] != others[key]]
        if differences:
            raise ConfigError(
                f"{name} and {other_name} cannot be compared: {'; '.join(differences)}. Measure both with the same "
                "--features, --size and --frames"
            )


GIVEN = SetIdentity(IDENTITY, "", "none", "none", 0, 0, 0)  # of features that were given as arrays


class Wanted(NamedTuple):
    """Parts of the statistics beside mean and covariance of the pooled features.

    Attributes:
        features: number n of samples whose features are kept, chosen by key; 0: none.
        spatial: mean and covariance of the spatial features.
        probabilities: class probabilities of all samples.
        captions: CLIP scores of all samples and their captions.
    """

    features: int = 0
    spatial: bool = False
    probabilities: bool = False
    captions: bool = False


@dataclass(frozen=True)
class SetStatistics:
    """Statistics of a set of samples.

    Attributes:
        name: where the samples come from.
        samples: number N; 0 if the file does not say.
        identity: None for a file of ADM, which has none: its features are those of Inception.
        pooled: mean and covariance of the pooled features.
        spatial: mean and covariance of the spatial features.
        features: float32 [n, D].
        probabilities: float32 [N, K].
        caption_score: mean CLIP score of the samples and their captions.
        stride: frame stride with which clips were read.
        data: fingerprint of the pixels, whatever their order.
        option: `--features` that loads the network again.
        first_kept: True: the features are those of the first samples, as in references of earlier versions.
    """

    name: str
    samples: int
    identity: SetIdentity | None
    pooled: Gaussian
    spatial: Gaussian | None = None
    features: NDArray[np.float32] | None = None
    probabilities: NDArray[np.float32] | None = None
    caption_score: float | None = None
    stride: int = 1
    data: str = ""
    option: str = ""
    first_kept: bool = False


class StatisticsCollector:
    """Collector of the statistics of a set, batch by batch, on one rank or several.

    Args:
        width: number D of features.
        spatial_width: number of spatial features, if they are wanted.
    """

    def __init__(self, width: int, wanted: Wanted, spatial_width: int = 0) -> None:
        self.wanted = wanted
        self.pooled = FeatureMoments(width)
        self.spatial = FeatureMoments(spatial_width) if wanted.spatial else None
        self._kept: list[tuple[Tensor, Tensor]] = []  # positions and features
        self._probabilities: list[tuple[Tensor, Tensor]] = []
        self._fingerprint, self._caption_scores = 0, 0.0

    def add(
        self,
        indices_B: Tensor,
        features: Features,
        pixels_BTHWC: Tensor | None = None,
        caption_scores_B: Tensor | None = None,
    ) -> None:
        """Add the features of samples at these positions of the set.

        Raises:
            DataError: a feature is NaN or infinite.
        """
        self.pooled.add(features.pooled)
        if self.spatial is not None and features.spatial is not None:
            self.spatial.add(features.spatial)
        if self.wanted.features:
            self._kept.append((indices_B, features.pooled.float()))
            if sum(len(indices) for indices, _ in self._kept) >= 2 * self.wanted.features:
                self._kept = [_chosen(self._kept, self.wanted.features)]
        if self.wanted.probabilities and features.logits is not None:
            self._probabilities.append((indices_B, features.logits.double().softmax(1).float()))
        if caption_scores_B is not None:
            self._caption_scores += float(caption_scores_B.sum())
        if pixels_BTHWC is not None:
            for sample in pixels_BTHWC.contiguous().numpy():
                self._fingerprint += xxhash.xxh3_64_intdigest(sample.tobytes())

    def result(
        self,
        name: str,
        identity: SetIdentity,
        *,
        mesh: "Mesh | None" = None,
        stride: int = 1,
        option: str = "",
    ) -> SetStatistics:
        """Statistics of what all ranks have added, on every rank. Collective with a mesh."""
        kept, probabilities = self._kept, self._probabilities
        if kept:
            kept = [_chosen(kept, self.wanted.features)]
        fingerprint, caption_scores = self._fingerprint, self._caption_scores
        if mesh is not None:
            self.pooled.all_reduce(mesh.all_reduce_sum_on_cpu)
            if self.spatial is not None:
                self.spatial.all_reduce(mesh.all_reduce_sum_on_cpu)
            parts = mesh.all_gather_object((kept, probabilities, fingerprint, caption_scores))
            kept = [one for part in parts for one in part[0]]
            probabilities = [one for part in parts for one in part[1]]
            fingerprint, caption_scores = sum(part[2] for part in parts), sum(part[3] for part in parts)
        return SetStatistics(
            name,
            self.pooled.count,
            identity,
            self.pooled.gaussian(),
            None if self.spatial is None else self.spatial.gaussian(),
            _chosen(kept, self.wanted.features)[1].numpy() if kept else None,
            _in_order(probabilities) if probabilities else None,
            caption_scores / self.pooled.count if self.wanted.captions else None,
            stride,
            f"{fingerprint % 2**64:016x}" if fingerprint else "",
            option,
        )


def measure_set(
    samples: SampleSet,
    network: FeatureNetwork,
    wanted: Wanted,
    *,
    option: str,
    batch_size: int = 32,
    mesh: "Mesh | None" = None,
    progress: Callable[[int], object] = lambda done: None,
) -> SetStatistics:
    """Statistics of a set in the features of a network; the ranks of a mesh divide the samples. Collective.

    Args:
        option: `--features` that loads the network again.
        progress: called with the number of samples done by all ranks, about.
    """
    collector = StatisticsCollector(network.width, wanted, network.spatial_width)
    rank, ranks = (mesh.data_rank, mesh.data_size) if mesh else (0, 1)
    done = 0
    for batch in samples.batches(batch_size, rank, ranks):
        features = network.extract(batch.pixels)
        scores = caption_scores(network, features, batch.indices, samples.captions) if wanted.captions else None
        collector.add(batch.indices, features, batch.pixels, scores)
        done += len(batch.indices) * ranks
        progress(min(done, samples.count))
    identity = SetIdentity.of(network, samples.size)
    return collector.result(samples.name, identity, mesh=mesh, stride=samples.stride, option=option)


def caption_scores(
    network: FeatureNetwork, features: Features, indices_B: Tensor, captions: Sequence[str] | None
) -> Tensor:
    """CLIP scores [B] of samples and their captions.

    Raises:
        ConfigError: there are no captions, or the network is not CLIP.
    """
    from rdm_scale.evaluation.networks.vision_folders import ClipFeatures, clip_scores

    if not isinstance(network, ClipFeatures) or not captions:
        raise ConfigError("a CLIP score needs samples with captions and --features clip=FOLDER")
    texts = [captions[index % len(captions)] for index in indices_B.tolist()]
    return clip_scores(features.pooled, network.captions(texts))


def given_features(array: NDArray[np.generic], name: str, wanted: Wanted) -> SetStatistics:
    """Statistics of features float [N, D] that somebody has computed.

    Raises:
        DataError: the array has another type or shape, is empty, or holds NaN or infinity.
    """
    if not np.issubdtype(array.dtype, np.floating) or array.ndim != 2 or not array.size:
        raise DataError(f"{name} holds {array.dtype} {list(array.shape)}: features are a float array [N, D], N above 0")
    collector = StatisticsCollector(array.shape[1], wanted)
    x = torch.from_numpy(np.ascontiguousarray(array).astype(np.float64))
    try:
        collector.add(torch.arange(len(x)), Features(x))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return collector.result(name, GIVEN, option=IDENTITY)


def _chosen(parts: list[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Positions and rows of `count` samples chosen by key, in the order of the positions."""
    positions, rows = (torch.cat(column) for column in zip(*parts, strict=True))
    chosen = kept_rows(positions, count)
    return positions[chosen], rows[chosen]


def _in_order(parts: list[tuple[Tensor, Tensor]]) -> NDArray[np.float32]:
    """Rows in the order of their positions."""
    positions, rows = (torch.cat(column) for column in zip(*parts, strict=True))
    return rows[positions.argsort()].numpy()
