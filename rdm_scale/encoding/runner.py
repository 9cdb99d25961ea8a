"""Encoding jobs run by one process, or by many that communicate through the output folder alone.

Shards are assigned to the ranks round-robin. Each is written completely and then recorded in the folder `.encoding` of
the output, so an interrupted job can be resumed with any number of ranks and ends with the same bytes. Rank 0 waits for
all records and writes the manifests from them, that of the training split last.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from rdm_scale.encoding.finalize import finalize
from rdm_scale.encoding.job import EncodingJob, EncodingResult, JobProgress, ProcessRank
from rdm_scale.encoding.pixels import READERS, load_sample, read_metadata
from rdm_scale.encoding.planning import EncodingPlan, MediaMetadata, PlannedShard, make_plan, needs_metadata
from rdm_scale.encoding.records import RecordStore, ShardRecord
from rdm_scale.encoding.shared_plan import SharedPlan
from rdm_scale.encoding.worker import StageTrace, Worker, no_trace
from rdm_scale.errors import DataError

_POLL_S = 0.5
_FILES_PER_BATCH = 4096
_SINGLE = ProcessRank()


def encode(
    job: EncodingJob,
    rank: ProcessRank = _SINGLE,
    progress: JobProgress = lambda stage, done, total: None,
    trace: StageTrace = no_trace,
) -> EncodingResult | None:
    """Run this rank's part of a job; rank 0 returns when the job is done.

    Args:
        progress: called after each inspected input and each encoded batch.
        trace: context manager entered around each stage of the worker, to measure it.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        DataError: the size does not fit the codec, a split would be empty, too many inputs cannot be decoded, a latent
            is not finite in the dtype, or the output cannot be written or contains another unfinished job.
    """
    for bucket in job.settings.buckets:
        job.codec.latent_shape(*bucket)
    try:
        shared = _share_plan(job, rank, progress)
        if shared is None:
            return None
        plan = make_plan(job.source, job.settings, shared.metadata)
        counter = _ProgressCounter(plan, RecordStore(job.output.work, plan, job.source), progress)
        if rank.rank and job.output.has_manifest():
            # The data set is complete, so records that this rank has not seen may have been removed.
            return None
        own = [shard for index, shard in enumerate(plan.shards) if index % rank.world_size == rank.rank]
        worker = Worker(job, trace)
        with _compute_threads(shared.threads):
            worker.run([shard for shard in own if shard not in counter.finished], counter.record, counter.advance)
            if rank.rank:
                return None
            while counter.update() < len(plan.shards):
                time.sleep(_POLL_S)
            return finalize(job, plan, counter.records)
    except OSError as error:
        raise DataError(f"cannot write {job.output.train}: {error}") from None


def _share_plan(job: EncodingJob, rank: ProcessRank, progress: JobProgress) -> SharedPlan | None:
    """Write the shared plan on rank 0, wait for it on the others. Returns None if the job is complete already."""
    work = job.output.work
    if rank.rank == 0 and not SharedPlan.exists(work):
        work.make_dir()
        metadata = list(_read_all_metadata(job, progress)) if needs_metadata(job.source, job.settings) else None
        _remove_outdated_records(job, make_plan(job.source, job.settings, metadata))
        shared = SharedPlan(job.digest, torch.get_num_threads(), metadata)
        shared.write(work)
        return shared
    while True:
        try:
            return SharedPlan.read(work, job.digest)
        except FileNotFoundError:
            if job.output.has_manifest():  # the other ranks finished before this one started
                return None
            time.sleep(_POLL_S)


class _ProgressCounter:
    """Counter and reporter of the samples encoded by all ranks, from the records of finished shards."""

    def __init__(self, plan: EncodingPlan, records: RecordStore, progress: JobProgress) -> None:
        self.records = records
        self.finished: set[PlannedShard] = set()  # shards, of all ranks
        self._plan, self._progress = plan, progress
        # Samples of this rank. The encoding thread alone counts the first, the writing thread the second.
        self._encoded = self._recorded = 0
        self.update()

    def record(self, shard: PlannedShard, record: ShardRecord) -> None:
        """Record a finished shard; called by the writing thread."""
        self.records.write(shard, record)
        self.finished = self.records.finished()
        self._recorded += len(shard.samples)

    def advance(self, samples: int) -> None:
        """Count samples of this rank that are encoded, but not written yet."""
        self._encoded += samples
        self._report()

    def update(self) -> int:
        """Look up the records of all ranks, and return the number of finished shards."""
        self.finished = self.records.finished()
        self._report()
        return len(self.finished)

    def _report(self) -> None:
        done = sum(len(shard.samples) for shard in self.finished) + self._encoded - self._recorded
        self._progress("encoding", min(done, self._plan.sample_count), self._plan.sample_count)


@contextmanager
def _compute_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _remove_outdated_records(job: EncodingJob, plan: EncodingPlan) -> None:
    """Remove records of shards that are no longer planned, or whose rejected inputs can be decoded now."""
    records = RecordStore(job.output.work, plan, job.source)
    records.remove_others()

    def outdated(shard: PlannedShard) -> bool:
        for rejected in records.read(shard).rejected:
            try:
                load_sample(job.source, shard.samples[rejected.position], shard.bucket, job.settings)
                return True
            except DataError:
                continue
        return False

    for shard in filter(outdated, records.finished()):
        records.remove(shard)


def _read_all_metadata(job: EncodingJob, progress: JobProgress) -> Iterator[MediaMetadata | str]:
    files = job.source.files

    def read(index: int) -> MediaMetadata | str:
        try:
            return read_metadata(files[index], job.source.kind, job.settings.fps)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(files), _FILES_PER_BATCH):
            for index, found in enumerate(pool.map(read, range(len(files))[first : first + _FILES_PER_BATCH]), first):
                yield found
                progress("looking", index + 1, len(files))
