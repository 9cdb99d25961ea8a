"""Opened data sets: the manifest is read, and the files of the shards are checked for presence and size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rdm_scale.config import DataConfig, DataSource
from rdm_scale.data.manifest import Manifest, TarIndex, read_manifest
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location, Stat


class OpenDataset(NamedTuple):
    """A data set ready to be read.

    Attributes:
        folder: folder of the shards.
        files: size and version of each file when the data set was opened, by name.
        damaged: for each shard that is missing or has the wrong size, by index, the error.
        weight: share of the steps, relative to other data sets.
    """

    manifest: Manifest
    folder: Location
    files: dict[str, Stat]
    damaged: dict[int, DataError]
    weight: float


class OpenSources(NamedTuple):
    """The data sets of a stream and the configuration that they are read with."""

    datasets: list[OpenDataset]
    config: DataConfig


# One data set by its manifest or folder, or several with weights, or what `open_sources` returned.
Sources = str | Path | Sequence[DataSource] | OpenSources


def open_dataset(source: DataSource, options: dict[str, Any] | None = None) -> OpenDataset:
    """Read the manifest of a data set and check the sizes of all its shards by one listing of the folder.

    Args:
        options: options of the fsspec file system.

    Raises:
        DataError: the manifest is missing or invalid, or the folder cannot be listed.
    """
    manifest, folder = read_manifest(source.path, options)
    try:
        files = folder.stats()
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error}") from None
    damaged: dict[int, DataError] = {}
    for index, shard in enumerate(manifest.shards):
        for tar in (shard, shard.text):
            if tar is not None and (problem := _size_problem(folder / tar.name, tar, files.get(tar.name))):
                damaged.setdefault(index, DataError(f"{problem}: copy or encode the data again"))
    return OpenDataset(manifest, folder, files, damaged, source.weight)


def open_sources(sources: Sources, config: DataConfig | None) -> OpenSources:
    """Open all data sets of a stream; without a configuration they are read with its defaults."""
    if isinstance(sources, OpenSources):
        return sources
    if isinstance(sources, str | Path):
        sources = [DataSource(path=str(sources))]
    config = config or DataConfig(train=tuple(sources))
    return OpenSources([open_dataset(source, config.options) for source in sources], config)


def _size_problem(location: Location, tar: TarIndex, file: Stat | None) -> str | None:
    if file is None:
        return f"{location} is missing, and the manifest lists it"
    if file.bytes != tar.bytes:
        return f"{location} has {file.bytes} bytes, the manifest says {tar.bytes}"
    return None
