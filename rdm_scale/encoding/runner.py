"""Encoding jobs run by one process, or by many that communicate through the output folder alone.

Shards are assigned to the ranks round-robin. Each is written completely and then recorded in the folder `.encoding` of
the output, so an interrupted job can be resumed with any number of ranks and ends with the same bytes. Rank 0 waits for
all records and writes the manifests from them, that of the training split last.
"""

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from rdm_scale.encoding.finalize import finalize
from rdm_scale.encoding.job import EncodingJob, EncodingResult, JobProgress, ProcessRank
from rdm_scale.encoding.pixels import DECODING_VERSION, READERS, read_metadata
from rdm_scale.encoding.planning import EncodingPlan, MediaMetadata, PlannedShard, make_plan, needs_metadata
from rdm_scale.encoding.records import RecordStore, ShardRecord
from rdm_scale.encoding.rejections import Rejection, RejectionPolicy
from rdm_scale.encoding.repeats import Report, changed_inputs, remove_outdated_records
from rdm_scale.encoding.shared_plan import SharedPlan
from rdm_scale.encoding.worker import StageTrace, Worker, no_trace
from rdm_scale.errors import DataError

_log = logging.getLogger(__name__)
_POLL_S = 0.5
LISTING_S = 600.0  # that rank 0 may be later than another rank in listing inputs that have changed
_FILES_PER_BATCH = 4096
_SINGLE = ProcessRank()


def encode(
    job: EncodingJob,
    rank: ProcessRank = _SINGLE,
    progress: JobProgress = lambda stage, done, total: None,
    trace: StageTrace = no_trace,
    report: Report = _log.warning,
) -> EncodingResult | None:
    """Run this rank's part of a job; rank 0 returns when the job is done.

    Args:
        progress: called after each inspected input and each encoded batch.
        trace: context manager entered around each stage of the worker, to measure it.
        report: called on rank 0 with lines for the user, such as the inputs that have changed since they were encoded.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        DataError: the size does not fit the codec, a split would be empty, too many inputs cannot be decoded, a latent
            is not finite in the dtype, or the output cannot be written or contains another unfinished job.
        StorageError: more inputs than allowed cannot be read from where they are stored.
    """
    for bucket in job.settings.buckets:
        job.codec.latent_shape(*bucket)
    try:
        shared = _share_plan(job, rank, progress, report)
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


def _share_plan(job: EncodingJob, rank: ProcessRank, progress: JobProgress, report: Report) -> SharedPlan | None:
    """Write the shared plan on rank 0, wait for it on the others. Returns None if the job is complete already."""
    if rank.rank == 0:
        return _resume_or_plan(job, progress, report)
    work, deadline = job.output.work, math.inf
    while True:
        try:
            shared = SharedPlan.read(work, job.digest)
            if shared.inputs in (None, job.inventory.digest):
                return shared
            # Rank 0 replaces a plan of other inputs as soon as it has listed them, too.
            deadline = min(deadline, time.monotonic() + LISTING_S)
        except FileNotFoundError:
            if job.output.has_manifest():  # the other ranks finished before this one started
                return None
            deadline = math.inf
        if time.monotonic() > deadline:
            raise DataError(
                f"rank {rank.rank} lists other inputs than rank 0, in size or time: do not change them while a job "
                "starts, and run the same command again"
            )
        time.sleep(_POLL_S)


def _resume_or_plan(job: EncodingJob, progress: JobProgress, report: Report) -> SharedPlan:
    """Read the plan of an interrupted job, or make a new one, if there is none or inputs have changed since."""
    work = job.output.work
    work.make_dir()
    changed = changed_inputs(job, report)
    if SharedPlan.exists(work):
        return SharedPlan.read(work, job.digest)
    metadata = list(_read_all_metadata(job, progress)) if needs_metadata(job.source, job.settings) else None
    remove_outdated_records(job, make_plan(job.source, job.settings, metadata), changed)
    job.inventory.write(work)  # once no record is left of an input that has changed since
    shared = SharedPlan(job.digest, torch.get_num_threads(), metadata, job.inventory.digest, DECODING_VERSION)
    shared.write(work)
    return shared


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


def _read_all_metadata(job: EncodingJob, progress: JobProgress) -> Iterator[MediaMetadata | Rejection]:
    files = job.source.files
    policy = RejectionPolicy(len(files), job.max_unreadable)

    def read(index: int) -> MediaMetadata | Rejection:
        try:
            return read_metadata(files[index], job.source.kind, job.settings.fps)
        except DataError as error:
            return policy.reject(error, files[index])

    with ThreadPoolExecutor(READERS) as pool:
        try:
            for first in range(0, len(files), _FILES_PER_BATCH):
                batch = range(len(files))[first : first + _FILES_PER_BATCH]
                for index, found in enumerate(pool.map(read, batch), first):
                    yield found
                    progress("looking", index + 1, len(files))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
