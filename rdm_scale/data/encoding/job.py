"""The encoding job: one process, or many that share the work without talking to each other.

The shards of a plan are dealt to the ranks in turn. Each is written whole and then recorded in the folder `.encoding`
of the output, so that a job that is cut off goes on where it was, with any number of ranks, and ends with the same
bytes. The first rank waits for all records and writes the manifests from them, that of the training set last.
"""

import base64
import json
import math
import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from rdm_scale.data.captions import TextEncoder, pack_text
from rdm_scale.data.codecs import LatentCodec
from rdm_scale.data.encoding.pixels import READERS, load, probe
from rdm_scale.data.encoding.planning import Plan, PlannedShard, Probe, Settings, make_plan, needs_probes
from rdm_scale.data.encoding.worker import Rejected, ShardLatents, Worker
from rdm_scale.data.inputs import MediaSet
from rdm_scale.data.manifest import NAME, Header, Manifest, Shard, TextEncoding, read_manifest
from rdm_scale.data.shards import DTYPES
from rdm_scale.data.storage import Location
from rdm_scale.errors import DataError

WORK, REJECTED = ".encoding", "rejected.jsonl"
_PLAN = "plan.json"
_POLL_S = 0.5

Progress = Callable[[int, int], object]


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

    def folder_of(self, side: str) -> Location:
        return self.folder if side == "train" or self.holdout is None else self.holdout


@dataclass(frozen=True)
class Encoded:
    """What was written, and the mean and standard deviation of the normalised training latents over all elements."""

    train: Manifest
    holdout: Manifest | None
    mean: float
    std: float


class _Record(BaseModel):
    """What became of a planned shard; `shard` is None when none of its inputs could be decoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard | None
    rejected: tuple[Rejected, ...]
    count: int  # elements of the normalised latents, their sum, and that of their squares
    total: float
    squares: float


def check_output(folders: Sequence[Location], digest: str) -> bool:
    """Whether the job of this digest has been done already, the first folder being its output.

    Raises:
        DataError: a folder holds anything else.
    """
    for i, one in enumerate(folders):
        for other in folders[:i]:
            if _contains(one, other) or _contains(other, one):
                raise DataError(f"{one} and {other} must be two folders, neither inside the other")
    for folder in folders:
        names = folder.names()
        if folder.exists() and not folder.is_dir():
            raise DataError(f"the output {folder} is a file, not a folder")
        if NAME in names and read_manifest(str(folder))[0].job != digest:
            raise DataError(
                f"{folder} already holds encoded data, of other inputs or made with other settings: "
                "choose another folder or remove it"
            )
        if strange := [name for name in names if not _is_ours(name)]:
            raise DataError(f"{folder} is not empty (it holds {strange[0]}): choose another folder")
    return NAME in folders[0].names()


def encode(job: Job, ranks: Ranks = _ALONE, progress: Progress = lambda done, total: None) -> Encoded | None:
    """Does this rank's part of a job; on the first rank ends when all of it is done.

    Args:
        progress: called as progress(samples done by all ranks, as far as is known, samples in all).

    Returns:
        What was written, on the first rank; None on the others.

    Raises:
        DataError: the size does not fit the codec, one side would be empty, too many inputs cannot be decoded, a latent
            is not finite in the dtype, the folder holds the beginnings of another job, or it cannot be written.
    """
    for bucket in job.settings.buckets:
        job.codec.latent_shape(*bucket)
    try:
        job.work.make_dir()
        plan = _agree_on_plan(job, ranks)
        watch = _Watch(job, plan, progress)
        mine = [shard for index, shard in enumerate(plan.shards) if index % ranks.size == ranks.rank]
        worker = Worker(job.source, job.settings, job.codec, job.text, job.folder_of)
        worker.run([shard for shard in mine if shard not in watch.done], watch.record, watch.advance)
        if ranks.rank:
            return None
        while watch.look() < len(plan.shards):
            time.sleep(_POLL_S)
        return _finish(job, plan)
    except OSError as error:
        raise DataError(f"cannot write {job.folder}: {error}") from None


class _Watch:
    """Keeps the records of shards, and knows which are done, by whomever."""

    def __init__(self, job: Job, plan: Plan, progress: Progress) -> None:
        self._job, self._plan, self._progress = job, plan, progress
        self._by_record = {_record_name(job, shard): shard for shard in plan.shards}
        self.done: set[PlannedShard] = set()
        self._advanced = 0  # samples of this rank that are encoded and not recorded yet
        self.look()

    def record(self, planned: PlannedShard, shard: Shard | None, encoded: ShardLatents) -> None:
        """Called by the writing thread."""
        figures = vars(encoded.statistics) if planned.side == "train" else {"count": 0, "total": 0.0, "squares": 0.0}
        record = _Record(shard=shard, rejected=tuple(encoded.rejected), **figures)
        (self._job.work / _record_name(self._job, planned)).write(record.model_dump_json().encode())
        self._advanced -= len(planned.items)
        self.look()

    def advance(self, samples: int) -> None:
        self._advanced += samples
        self._tell()

    def look(self) -> int:
        """The number of shards that are done."""
        self.done = {self._by_record[name] for name in self._job.work.names() if name in self._by_record}
        self._tell()
        return len(self.done)

    def _tell(self) -> None:
        done = sum(len(shard.items) for shard in self.done) + self._advanced
        self._progress(min(done, self._plan.samples), self._plan.samples)


def _record_name(job: Job, shard: PlannedShard) -> str:
    """Tied to what the shard is planned to hold: a record of another plan is never taken for one of this."""
    return f"{shard.side}-{shard.number:06d}-{shard.digest(job.source)}.json"


def _agree_on_plan(job: Job, ranks: Ranks) -> Plan:
    """The plan, from the inputs' sizes as the first rank has found them."""
    place = job.work / _PLAN
    if ranks.rank == 0 and not place.exists():
        probes = list(_probe_all(job)) if needs_probes(job.source, job.settings) else None
        _forget_mended(job, make_plan(job.source, job.settings, probes))
        place.write(json.dumps({"job": job.digest, "probes": probes}).encode())
    while not place.exists():
        time.sleep(_POLL_S)
    try:
        found = json.loads(place.read())
        if found["job"] != job.digest:
            raise DataError(
                f"{job.folder} holds the beginnings of an encoding of other inputs or with other settings: give the "
                "same ones to go on with it, or remove the folder"
            )
        probes = found["probes"]
        sizes = None if probes is None else [p if isinstance(p, str) else Probe(*map(int, p)) for p in probes]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is damaged ({error}): remove {job.folder} and encode again") from None
    return make_plan(job.source, job.settings, sizes)


def _forget_mended(job: Job, plan: Plan) -> None:
    """Removes the records of shards of which an input was rejected that can be decoded now."""
    present = set(job.work.names())
    for shard in (shard for shard in plan.shards if _record_name(job, shard) in present):
        for rejected in _read_record(job, shard).rejected:
            try:
                load(job.source, shard.items[rejected.item], shard.bucket, job.settings)
            except DataError:
                continue
            (job.work / _record_name(job, shard)).remove()
            break


def _probe_all(job: Job) -> Iterator[Probe | str]:
    def size(index: int) -> Probe | str:
        try:
            return probe(job.source.files[index], job.source.kind, job.settings.fps)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(size, range(len(job.source.files)))


def _finish(job: Job, plan: Plan) -> Encoded:
    """Writes what was rejected and the manifests, and removes the records."""
    records = {shard: _read_record(job, shard) for shard in plan.shards}
    _check_files(job, records)
    rejected = [(job.source.files[index].name, reason) for index, reason in plan.unfit.items()]
    rejected += [(one.input, one.reason) for record in records.values() for one in record.rejected]
    if rejected:
        lines = (json.dumps({"input": name, "reason": reason}, ensure_ascii=False) for name, reason in rejected)
        (job.folder / REJECTED).write(("\n".join(lines) + "\n").encode())
    inputs = plan.samples + len(plan.unfit)
    if len(rejected) > job.max_rejected * inputs:
        (job.work / _PLAN).remove()  # it is made anew, since the inputs may be mended by then
        raise DataError(
            f"{len(rejected)} of {inputs} inputs cannot be encoded, more than a share of {job.max_rejected}: see "
            f"{job.folder / REJECTED}. The first: {rejected[0][1]}. Mend or remove them, or raise --max-rejected, and "
            "run the same command again: it goes on with what is done"
        )
    holdout = None if job.holdout is None else _manifest(job, records, "holdout", 0)
    train = _manifest(job, records, "train", len(rejected))
    for manifest, folder in ((holdout, job.holdout), (train, job.folder)):
        if manifest is not None and folder is not None:
            (folder / NAME).write(manifest.to_json())
    job.work.remove()
    count = max(1, sum(record.count for record in records.values()))
    mean = sum(record.total for record in records.values()) / count
    variance = sum(record.squares for record in records.values()) / count - mean**2
    return Encoded(train, holdout, mean, math.sqrt(max(variance, 0.0)))


def _read_record(job: Job, shard: PlannedShard) -> _Record:
    place = job.work / _record_name(job, shard)
    try:
        return _Record.model_validate_json(place.read())
    except ValidationError:
        place.remove()
        raise DataError(f"{place} is damaged and was removed: run the same command again") from None


def _check_files(job: Job, records: dict[PlannedShard, _Record]) -> None:
    """What was recorded may have been removed since."""
    found = {side: job.folder_of(side).stats() for side in ("train", "holdout")}
    for planned, record in records.items():
        for tar in (record.shard, record.shard.text) if record.shard else ():
            if tar is not None and (
                tar.name not in found[planned.side] or found[planned.side][tar.name].bytes != tar.bytes
            ):
                (job.work / _record_name(job, planned)).remove()
                raise DataError(
                    f"{job.folder_of(planned.side) / tar.name} was written and is no longer there, or not whole: run "
                    "the same command again"
                )


def _manifest(job: Job, records: dict[PlannedShard, _Record], side: str, rejected: int) -> Manifest:
    shards = [record.shard for planned, record in records.items() if planned.side == side and record.shard]
    if not shards:
        raise DataError(f"none of the inputs of the {side} side could be encoded: see {job.folder / REJECTED}")
    shape = shards[0].shape
    assert shape is not None
    header = Header(
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
        rejected=rejected,
        shards=tuple(s.model_copy(update={"shape": None}) if s.shape == shape else s for s in shards),
    )


def _text_encoding(job: Job) -> TextEncoding | None:
    if job.text is None:
        return None
    record, dtype = job.text.record, job.settings.dtype
    empty = pack_text(job.text.encode([""]), torch.zeros(1, dtype=torch.int64), DTYPES[dtype])
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


def _is_ours(name: str) -> bool:
    return name in (WORK, NAME, REJECTED) or (name.startswith(("shard-", "text-")) and name.endswith(".tar"))


def _contains(outer: Location, inner: Location) -> bool:
    return str(outer) == str(inner) or str(inner).startswith(posixpath.join(str(outer), ""))
