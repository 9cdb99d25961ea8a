"""A small set of latents, as the fixture `write_set` makes them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.manifest import Manifest
from rdm_scale.storage.location import Location

IDENTITY = CodecRecord(name="identity", location="identity")


@dataclass
class LatentSet:
    """A written set, and the samples that went into it."""

    folder: Location
    manifest: Manifest
    latents: Tensor
    ids: Tensor
    labels: Tensor

    @property
    def url(self) -> str:
        return str(self.folder)


WriteSet = Callable[..., LatentSet]
