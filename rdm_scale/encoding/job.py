"""Description of an encoding job, and its result."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from rdm_scale.codecs import LatentCodec
from rdm_scale.data.manifest import Manifest
from rdm_scale.encoding.inputs import MediaSet
from rdm_scale.encoding.inventory import Inventory
from rdm_scale.encoding.output import OutputFolders
from rdm_scale.encoding.planning import EncodingSettings, inputs_digest, job_digest
from rdm_scale.encoding.remarks import Remarks
from rdm_scale.encoding.text import TextEncoder

JobStage = Literal["looking", "encoding"]


class JobProgress(Protocol):
    """Receiver of the progress of a job."""

    def __call__(self, stage: JobStage, done: int, total: int) -> object:
        """Receive the number of inputs inspected, or of samples that this rank knows to be encoded by any rank."""


class ProcessRank(NamedTuple):
    """Rank of a process, and the number of processes that share the job."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class EncodingJob:
    """Inputs, settings, models and output folders of an encoding.

    Args:
        text: encoder of the captions; None: captions are left out.
        digest: hash of everything that determines the output, see `job_digest`.
        max_rejected: share of the inputs that may be undecodable.
        max_unreadable: share of the inputs that may be unreadable where they are stored.
        trust_inputs: take inputs whose sizes or times have changed since they were encoded as unchanged.
        inventory: identity of each input.
    """

    source: MediaSet
    settings: EncodingSettings
    codec: LatentCodec
    text: TextEncoder | None
    output: OutputFolders
    digest: str
    max_rejected: float
    max_unreadable: float
    trust_inputs: bool
    inventory: Inventory

    @classmethod
    def create(
        cls,
        source: MediaSet,
        settings: EncodingSettings,
        codec: LatentCodec,
        output: OutputFolders,
        text: TextEncoder | None = None,
        max_rejected: float = 0.0,
        inputs: str | None = None,
        *,
        max_unreadable: float = 0.0,
        trust_inputs: bool = False,
    ) -> "EncodingJob":
        """Describe a job and compute its digest.

        Args:
            inputs: the `inputs_digest`, if it has been computed already.
        """
        digest = job_digest(inputs or inputs_digest(source, settings), codec.record, text.record if text else None)
        inventory = Inventory.of(source)
        return cls(source, settings, codec, text, output, digest, max_rejected, max_unreadable, trust_inputs, inventory)


@dataclass(frozen=True)
class EncodingResult:
    """Manifests of a finished job, and statistics of its normalized training latents over all elements."""

    train: Manifest
    holdout: Manifest | None
    mean: float
    std: float
    truncated: int  # number of captions that were truncated
    remarks: Remarks
