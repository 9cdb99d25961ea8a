"""Identity of every input of a job, by which a repeated or resumed job finds the inputs that have changed.

It is made of what listing the input says: place, size and version (time of the last change, or ETag), class and
caption. No file is read for it. Behind http addresses nothing is listed, so there only the address counts.
"""

import json
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import xxhash

from rdm_scale.encoding.inputs import MediaFile, MediaSet
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

INVENTORY_NAME = "inputs.safetensors"


class InputChanges(NamedTuple):
    """Differences between the inputs that were recorded and those that are there now."""

    changed: list[int]  # indices of inputs that were recorded with other sizes, times, classes or captions
    new: list[int]  # indices of inputs that were not recorded
    gone: int  # number of recorded inputs that are no longer there

    def describe(self, source: MediaSet) -> str:
        """Enumerate the changes, with the first of each kind; empty if there are none."""
        parts = [
            f"{len(indices)} {what} ({'' if len(indices) == 1 else 'the first: '}{source.files[indices[0]].name})"
            for indices, what in ((self.changed, "changed"), (self.new, "new"))
            if indices
        ]
        return ", ".join([*parts, f"{self.gone} no longer there"] if self.gone else parts)


class Inventory(NamedTuple):
    """Hashes of the keys and identities of all inputs, in their order, and the place that they were listed at."""

    keys: np.ndarray  # uint64 [N]
    identities: np.ndarray  # uint64 [N]
    place: str

    @classmethod
    def of(cls, source: MediaSet) -> "Inventory":
        """Make the inventory of the inputs as they are listed now."""
        number = len(source.files)
        keys = np.fromiter((_hash(file.key) for file in source.files), np.uint64, number)
        identities = (_hash(_identity(file, source)) for file in source.files)
        return cls(keys, np.fromiter(identities, np.uint64, number), source.place)

    @property
    def digest(self) -> str:
        """Hash of all inputs."""
        return xxhash.xxh3_128_hexdigest(self.keys.tobytes() + self.identities.tobytes())

    def changes_to(self, now: "Inventory") -> InputChanges:
        """Compare with the inventory of a later listing."""
        order = np.argsort(self.keys)
        ordered, identities = self.keys[order], self.identities[order]
        at = np.searchsorted(ordered, now.keys).clip(max=max(len(ordered) - 1, 0))
        known = ordered[at] == now.keys if len(ordered) else np.zeros(len(now.keys), bool)
        changed = known & (identities[at] != now.identities) if len(ordered) else known
        gone = len(np.setdiff1d(self.keys, now.keys))
        return InputChanges(np.flatnonzero(changed).tolist(), np.flatnonzero(~known).tolist(), gone)

    def write(self, work: Location) -> None:
        tensors = {"keys": self.keys, "identities": self.identities}
        (work / INVENTORY_NAME).write(safetensors.numpy.save(tensors, {"place": self.place}))

    @staticmethod
    def read(work: Location) -> "Inventory | None":
        """Read the inventory of a job; None: there is none, since it has not begun or an earlier version began it.

        Raises:
            DataError: it is damaged.
        """
        file = work / INVENTORY_NAME
        try:
            content = file.read()
        except FileNotFoundError:
            return None
        try:
            tensors = safetensors.numpy.load(content)
            length = int.from_bytes(content[:8], "little")
            place = json.loads(content[8 : 8 + length])["__metadata__"]["place"]
            found = Inventory(tensors["keys"], tensors["identities"], place)
            if found.keys.dtype != np.uint64 or found.keys.shape != found.identities.shape or found.keys.ndim != 1:
                raise ValueError("wrong shapes")
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is damaged ({error}): remove {work.parent} and encode again") from None
        return found


def _identity(file: MediaFile, source: MediaSet) -> str:
    class_name = source.class_names[file.label] if file.label >= 0 else None
    return repr((file.origin, file.length, file.version, file.offset, class_name, file.caption))


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))
