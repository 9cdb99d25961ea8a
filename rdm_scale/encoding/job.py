"""The encoding job: one process, or many that share the work without talking to each other.

The shards of a plan are dealt to the ranks in turn. Each is written whole and then recorded in the folder `.encoding`
of the output, so that a job that is cut off goes on where it was, with any number of ranks, and ends with the same
bytes. The first rank waits for all records and writes the manifests from them, that of the training set last.
"""

import base64
import json
import math
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rdm_scale.codecs import LatentCodec
from rdm_scale.data.captions import pack_text
from rdm_scale.data.manifest import MANIFEST_NAME, Manifest, ManifestHeader, TextEncoding, read_manifest
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.encoding.inputs import MediaSet
from rdm_scale.encoding.pixels import READERS, load, probe
from rdm_scale.encoding.planning import SIDES, Plan, PlannedShard, Probe, Settings, make_plan, needs_probes
from rdm_scale.encoding.records import Record, Records
from rdm_scale.encoding.text import TextEncoder
from rdm_scale.encoding.worker import Worker
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

WORK, REJECTED = ".encoding", "rejected.jsonl"
_PLAN = "plan.json"
_POLL_S = 0.5
_PROBES_AT_ONCE = 4096
_SHARD = re.compile(r"(shard|text)-\d+\.tar(\.partial-\d+)?")  # partial: what a process that is killed leaves behind
_OTHERS = re.compile(rf"{re.escape(WORK)}|({MANIFEST_NAME}|{REJECTED})(\.partial-\d+)?")

Progress = Callable[[str, int, int], object]


class Ranks(NamedTuple):
    """Which of the processes that share a job this is."""

    rank: int = 0
    size: int = 1


_ALONE = Ranks()


@dataclass(frozen=True)
class Job:
    """What is to be encoded, how, and where to.

    Args:
        text: of the captions; None: they are left out.
        holdout: folder of the held-out samples; None where `settings.holdout_share` is 0.
        digest: `planning.job_digest` of it all.
        max_rejected: share of the inputs that may turn out to be undecodable.
    """

    source: MediaSet
    settings: Settings
    codec: LatentCodec
    text: TextEncoder | None
    folder: Location
    holdout: Location | None
    digest: str
    max_rejected: float

    @property
    def work(self) -> Location:
        return self.folder / WORK

    @property
    def folders(self) -> dict[str, Location]:
        """By side."""
        return {"train": self.folder} | ({"holdout": self.holdout} if self.holdout else {})


@dataclass(frozen=True)
class Encoded:
    """What was written, and the mean and standard deviation of the normalized training latents over all elements."""

    train: Manifest
    holdout: Manifest | None
    mean: float
    std: float
    truncated: int  # captions that were cut


def check_output(folders: Sequence[Location], digest: str) -> bool:
    """Whether the job of this digest, or of one that begins so, has been done already, the first folder its output.

    Raises:
        DataError: a folder holds anything else.
    """
    for i, one in enumerate(folders):
        for other in folders[:i]:
            if _contains(one, other) or _contains(other, one):
                raise DataError(f"{one} and {other} must be two folders, neither inside the other")
    try:
        done = [_is_done(folder, digest) for folder in folders]
    except OSError as error:
        raise DataError(f"cannot look into the output: {error}") from None
    return all(done)


def _is_done(folder: Location, digest: str) -> bool:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"the output {folder} is a file, not a folder")
    names = folder.names()
    if MANIFEST_NAME in names:
        if not read_manifest(str(folder))[0].job.startswith(digest):
            raise DataError(
                f"{folder} already holds encoded data, of other inputs or made with other settings: "
                "choose another folder or remove it"
            )
        return True
    if strange := [name for name in names if not (_SHARD.fullmatch(name) or _OTHERS.fullmatch(name))]:
        raise DataError(f"{folder} is not empty (it holds {strange[0]}): choose another folder")
    if WORK in names:
        with suppress(FileNotFoundError):  # no plan yet, or, when other ranks have just finished, no longer
            _read_plan(folder, digest)
    return False


def encode(job: Job, ranks: Ranks = _ALONE, progress: Progress = lambda stage, done, total: None) -> Encoded | None:
    """Does this rank's part of a job; on the first rank ends when all of it is done.

    Args:
        progress: called as progress("looking" or "encoding", done, in all): how many inputs have been looked at for
            their size, then how many samples have been encoded by all ranks, as far as is known.

    Returns:
        What was written, on the first rank; None on the others.

    Raises:
        DataError: the size does not fit the codec, one side would be empty, too many inputs cannot be decoded, a latent
            is not finite in the dtype, the folder holds the beginnings of another job, or it cannot be written.
    """
    for bucket in job.settings.buckets:
        job.codec.latent_shape(*bucket)
    try:
        agreed = _agree(job, ranks, progress)
        if agreed is None:
            return None
        plan = make_plan(job.source, job.settings, agreed.probes)
        watch = _Watch(plan, Records(job.work, plan, job.source), progress)
        if ranks.rank and MANIFEST_NAME in job.folder.names():
            # The data set is complete, so records that this rank has not seen may have been removed.
            return None
        mine = [shard for index, shard in enumerate(plan.shards) if index % ranks.size == ranks.rank]
        worker = Worker(job.source, job.settings, job.codec, job.text, job.folders.__getitem__)
        with _threads(agreed.threads):
            worker.run([shard for shard in mine if shard not in watch.done], watch.record, watch.advance)
            if ranks.rank:
                return None
            while watch.look() < len(plan.shards):
                time.sleep(_POLL_S)
            return _finish(job, plan, watch.records)
    except OSError as error:
        raise DataError(f"cannot write {job.folder}: {error}") from None


class _Agreed(NamedTuple):
    """Kept in the output until the job is done."""

    job: str  # its digest
    threads: int  # that compute on a CPU: with another number the last bits of latents differ
    probes: list[Probe | str] | None  # sizes of the inputs, or why they have none


class _Watch:
    """Keeps the records of shards, and tells how much is done, by whomever."""

    def __init__(self, plan: Plan, records: Records, progress: Progress) -> None:
        self.records = records
        self._plan, self._progress = plan, progress
        # Samples of this rank; each is counted by one thread only.
        self._encoded = self._recorded = 0
        self.look()

    def record(self, shard: PlannedShard, record: Record) -> None:
        """Called by the writing thread."""
        self.records.write(shard, record)
        self.done = self.records.done()
        self._recorded += len(shard.items)

    def advance(self, samples: int) -> None:
        self._encoded += samples
        self._tell()

    def look(self) -> int:
        """The number of shards that are done."""
        self.done = self.records.done()
        self._tell()
        return len(self.done)

    def _tell(self) -> None:
        done = sum(len(shard.items) for shard in self.done) + self._encoded - self._recorded
        self._progress("encoding", min(done, self._plan.samples), self._plan.samples)


def _agree(job: Job, ranks: Ranks, progress: Progress) -> _Agreed | None:
    """What all ranks take from the first one; None when the job is done already."""
    place = job.work / _PLAN
    if ranks.rank == 0 and not place.exists():
        job.work.make_dir()
        probes = list(_probe_all(job, progress)) if needs_probes(job.source, job.settings) else None
        _forget(job, make_plan(job.source, job.settings, probes))
        agreed = _Agreed(job.digest, torch.get_num_threads(), probes)
        place.write(json.dumps(agreed._asdict()).encode())
        return agreed
    while True:
        try:
            return _read_plan(job.folder, job.digest)
        except FileNotFoundError:
            if MANIFEST_NAME in job.folder.names():  # the other ranks have finished before this one has begun
                return None
            time.sleep(_POLL_S)


def _read_plan(folder: Location, digest: str) -> _Agreed:
    """Raises DataError: it is that of another job, or damaged; FileNotFoundError."""
    place = folder / WORK / _PLAN
    content = place.read()
    try:
        found = _Agreed(**json.loads(content))
        same = found.job.startswith(digest)
        if found.probes is not None:
            probes = [p if isinstance(p, str) else Probe(*map(int, p)) for p in found.probes]
            found = found._replace(probes=probes)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{place} is damaged ({error}): remove {folder} and encode again") from None
    if not same:
        raise DataError(
            f"{folder} holds the beginnings of an encoding of other inputs or with other settings: give the same ones "
            "to go on with it, or remove the folder"
        )
    return found


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _forget(job: Job, plan: Plan) -> None:
    """Removes the records of shards that are no longer planned, or have an input that can be decoded by now."""
    records = Records(job.work, plan, job.source)
    records.forget_others()

    def mended(shard: PlannedShard) -> bool:
        for rejected in records.read(shard).rejected:
            try:
                load(job.source, shard.items[rejected.item], shard.bucket, job.settings)
                return True
            except DataError:
                continue
        return False

    for shard in filter(mended, records.done()):
        records.forget(shard)


def _probe_all(job: Job, progress: Progress) -> Iterator[Probe | str]:
    files = job.source.files

    def size(index: int) -> Probe | str:
        try:
            return probe(files[index], job.source.kind, job.settings.fps)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(files), _PROBES_AT_ONCE):
            for index, found in enumerate(pool.map(size, range(len(files))[first : first + _PROBES_AT_ONCE]), first):
                yield found
                progress("looking", index + 1, len(files))


def _finish(job: Job, plan: Plan, kept: Records) -> Encoded:
    """Writes what was rejected and the manifests, and removes the records."""
    records = {shard: kept.read(shard) for shard in plan.shards}
    _check_files(job, records, kept)
    rejected = _rejected(plan, records)
    _write_rejected(job, rejected)
    files = job.source.files
    if len(rejected) > job.max_rejected * len(files):
        (job.work / _PLAN).remove()  # it is made anew, since the inputs may be mended by then
        raise DataError(
            f"{len(rejected)} of {len(files)} inputs cannot be encoded, more than a share of {job.max_rejected}: see "
            f"{job.folder / REJECTED}. The first: {next(iter(rejected.values()))}. Mend or remove them, or raise "
            "--max-rejected, and run the same command again: it goes on with what is done"
        )
    manifests = {side: _manifest(job, records, side, len(rejected)) for side in job.folders}
    for side in reversed(SIDES):  # that of the training set last: with it all is done
        if side in manifests:
            (job.folders[side] / MANIFEST_NAME).write(manifests[side].to_json())
    job.work.remove()
    trained = [record for shard, record in records.items() if shard.side == "train"]
    count = max(1, sum(record.count for record in trained))
    mean = sum(record.total for record in trained) / count
    variance = sum(record.squares for record in trained) / count - mean**2
    truncated = sum(record.truncated for record in records.values())
    return Encoded(manifests["train"], manifests.get("holdout"), mean, math.sqrt(max(variance, 0.0)), truncated)


def _check_files(job: Job, records: dict[PlannedShard, Record], kept: Records) -> None:
    """What was recorded may have been removed since; and what no record knows of, of an earlier plan, has to go."""
    found = {side: folder.stats() for side, folder in job.folders.items()}
    for planned, record in records.items():
        for tar in (record.shard, record.shard.text) if record.shard else ():
            if tar is None:
                continue
            stat = found[planned.side].pop(tar.name, None)
            if stat is None or stat.bytes != tar.bytes:
                kept.forget(planned)
                raise DataError(
                    f"{job.folders[planned.side] / tar.name} was written and is no longer there, or not whole: run "
                    "the same command again"
                )
    for side, left in found.items():
        for name in filter(_SHARD.fullmatch, left):
            (job.folders[side] / name).remove()


def _rejected(plan: Plan, records: dict[PlannedShard, Record]) -> dict[int, str]:
    """The inputs of which nothing, or not all, could be encoded, with the first reason."""
    rejected = dict(plan.unfit)
    for planned, record in records.items():
        for one in record.rejected:
            rejected.setdefault(planned.items[one.item].file, one.reason)
    return dict(sorted(rejected.items()))


def _write_rejected(job: Job, rejected: dict[int, str]) -> None:
    place = job.folder / REJECTED
    if rejected:
        lines = [{"input": job.source.files[index].name, "reason": reason} for index, reason in rejected.items()]
        place.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    elif place.exists():  # from a time when some were
        place.remove()


def _manifest(job: Job, records: dict[PlannedShard, Record], side: str, rejected: int) -> Manifest:
    shards = [record.shard for planned, record in records.items() if planned.side == side and record.shard]
    if not shards:
        raise DataError(f"none of the inputs of the {side} side could be encoded: see {job.folder / REJECTED}")
    shape = shards[0].shape
    assert shape is not None
    header = ManifestHeader(
        kind=job.settings.kind,
        dtype=job.settings.dtype,
        shape=shape,
        codec=job.codec.record,
        class_names=job.source.class_names,
        text=_text_encoding(job),
    )
    return Manifest(
        **dict(header),
        job=job.digest,
        samples=sum(shard.samples for shard in shards),
        rejected=rejected if side == "train" else 0,
        shards=tuple(s.model_copy(update={"shape": None}) if s.shape == shape else s for s in shards),
    )


def _text_encoding(job: Job) -> TextEncoding | None:
    if job.text is None:
        return None
    record, dtype = job.text.record, job.settings.dtype
    empty = pack_text(job.text.encode([""]), torch.zeros(1, dtype=torch.int64), STORED_DTYPES[dtype].torch)
    return TextEncoding(
        encoder=record.name,
        location=record.location,
        digest=record.digest,
        width=record.width,
        pooled_width=record.pooled_width,
        max_tokens=record.max_tokens,
        dtype=dtype,
        empty=base64.b64encode(empty).decode(),
    )


def _contains(outer: Location, inner: Location) -> bool:
    return str(outer) == str(inner) or str(inner).startswith(posixpath.join(str(outer), ""))
