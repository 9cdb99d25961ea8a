"""Repeated and resumed jobs: what has changed since a job was run, and which shards have to be encoded again.

A job leaves its plan, its records and the inventory of its inputs in the folder `.encoding` of the output. When the
same command is given again, the shards that hold inputs that have changed since are encoded again; the others stay.
"""

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

from rdm_scale.data.manifest import MANIFEST_NAME
from rdm_scale.encoding.inputs import MediaSet
from rdm_scale.encoding.inventory import InputChanges, Inventory
from rdm_scale.encoding.job import EncodingJob, ProcessRank
from rdm_scale.encoding.output import OutputFolders
from rdm_scale.encoding.pixels import DECODING_VERSION, load_sample, read_metadata
from rdm_scale.encoding.planning import EncodingPlan, PlannedShard, make_plan
from rdm_scale.encoding.records import RecordStore
from rdm_scale.encoding.rejections import Rejection
from rdm_scale.encoding.shared_plan import OtherJobError, SharedPlan
from rdm_scale.errors import DataError

Report = Callable[[str], object]  # called with a line for the user

# What is left to do: nothing; the part of all ranks; or so little that rank 0 does it alone.
Remainder = Literal["nothing", "shared", "alone"]
NOT_RECORDED = (
    "it was begun by an earlier version, which did not record the sizes and times of its inputs: whether they have "
    "changed since is not known, and some files are decoded otherwise now (see CHANGELOG.md); to encode all of "
    "it anew, choose another output folder"
)
_UNREADABLE = b'"cause": "storage"'  # in the list of rejected inputs


class JobStatus(NamedTuple):
    """State of the output folders of a job."""

    complete: bool  # all manifests are written
    recorded: bool  # the identities of the inputs are known
    changes: InputChanges  # of the inputs, since they were encoded


def check_output(output: OutputFolders, digest: str, source: MediaSet) -> bool:
    """Check that a job may write to its output folders, and return True if it is complete already.

    Args:
        digest: digest of the job, or the beginning of it.

    Raises:
        DataError: they hold something else; of another job the differences between the inputs are said.
    """
    try:
        return output.check(digest)
    except OtherJobError as error:
        recorded = Inventory.read(output.work)
        if recorded is None:
            raise
        differences = recorded.changes_to(Inventory.of(source)).describe(source)
        known = f"inputs since then: {differences}" if differences else "the inputs are the same, so settings differ"
        raise OtherJobError(f"{error} ({known})") from None


def job_status(job: EncodingJob) -> JobStatus:
    """Look up the state of the output folders.

    Raises:
        DataError: they hold something else, or were made from another input with files of the same names.
    """
    complete = check_output(job.output, job.digest, job.source)
    recorded = Inventory.read(job.output.work)
    if recorded is None:
        return JobStatus(complete, False, InputChanges([], [], 0))
    changes = recorded.changes_to(job.inventory)
    if changes.changed and recorded.place != job.source.place and not job.trust_inputs:
        raise OtherJobError(
            f"{job.output.train} holds the encoding of {recorded.place}, and {job.source.place} has other files of the "
            f"same names ({changes.describe(job.source)}): choose another output folder, or remove this one"
        )
    return JobStatus(complete, True, changes)


def remaining(job: EncodingJob, rank: ProcessRank, report: Report) -> Remainder:
    """Find out what is left to do of a job that may be complete.

    Inputs that could not be read when it was completed are looked for again.

    Raises:
        DataError: the output folders hold something else.
    """
    status = job_status(job)
    if not status.complete or (status.changes.changed and not job.trust_inputs):
        return "shared"
    if rank.rank:
        return "nothing"
    if status.changes.changed:
        accept_inputs(job)
    if _some_readable_now(job):
        report("some inputs that could not be read can be read now: the shards that they belong to are encoded again")
        reopen(job)
        return "alone"
    note = "" if status.recorded else f" ({NOT_RECORDED})"
    report(f"{job.output.train / MANIFEST_NAME}: complete already, nothing to do{note}")
    return "nothing"


def changed_inputs(job: EncodingJob, report: Report) -> Collection[int]:
    """Find the inputs that have changed since they were recorded, on rank 0, and make the job ready to go on.

    If there are any, the job is no longer complete.
    """
    status = job_status(job)
    if SharedPlan.exists(job.output.work):
        begun = SharedPlan.read(job.output.work, job.digest)
        if begun.decoding != DECODING_VERSION:
            report(
                f"{job.output.train} was begun by a version that decodes images and videos to other pixels: all of it "
                "is encoded again"
            )
            reopen(job)
    changed = frozenset(status.changes.changed)
    if not status.recorded and SharedPlan.exists(job.output.work):
        report(f"{job.output.train}: {NOT_RECORDED}. What it has encoded is kept")
    if changed and job.trust_inputs:
        accept_inputs(job)
    elif changed:
        report(
            f"inputs since they were encoded: {status.changes.describe(job.source)}; the shards that hold them are "
            "encoded again"
        )
        reopen(job)
    return frozenset() if job.trust_inputs else changed


def accept_inputs(job: EncodingJob) -> None:
    """Record the inputs as they are now as those that were encoded."""
    work = job.output.work
    job.inventory.write(work)
    if SharedPlan.exists(work):
        SharedPlan.read(work, job.digest)._replace(inputs=job.inventory.digest).write(work)


def reopen(job: EncodingJob) -> None:
    """Remove the manifests and the plan of a job, so that it is planned again; records and shards stay."""
    for folder in job.output.by_split.values():  # that of the training split first, which marks the job as complete
        if MANIFEST_NAME in folder.names():
            (folder / MANIFEST_NAME).remove()
    if SharedPlan.exists(job.output.work):
        SharedPlan.remove(job.output.work)


def remove_outdated_records(job: EncodingJob, plan: EncodingPlan, changed: Collection[int]) -> None:
    """Remove records of shards that are not planned, were decoded otherwise, or have to be encoded again.

    That is those that hold changed inputs, or rejected ones that load by now.
    """
    records = RecordStore(job.output.work, plan, job.source)
    records.remove_others()

    def outdated(shard: PlannedShard) -> bool:
        record = records.read(shard)
        if record.decoding != DECODING_VERSION or any(sample.file in changed for sample in shard.samples):
            return True
        return any(_loads(job, shard, one.position) for one in record.rejected)

    for shard in filter(outdated, records.finished()):
        records.remove(shard)


def _some_readable_now(job: EncodingJob) -> bool:
    """True if an input can be read now that could not be read when the job was completed."""
    if not job.output.rejected.exists() or _UNREADABLE not in job.output.rejected.read():
        return False
    try:
        metadata = SharedPlan.read(job.output.work, job.digest).metadata
    except FileNotFoundError:
        return False
    for index, one in enumerate(metadata or ()):
        if isinstance(one, Rejection) and one.cause == "storage" and _has_metadata(job, index):
            return True
    plan = make_plan(job.source, job.settings, metadata)
    records = RecordStore(job.output.work, plan, job.source)
    return any(
        one.cause == "storage" and _loads(job, shard, one.position)
        for shard in records.finished()
        for one in records.read(shard).rejected
    )


def _loads(job: EncodingJob, shard: PlannedShard, position: int) -> bool:
    try:
        load_sample(job.source, shard.samples[position], shard.bucket, job.settings)
    except DataError:
        return False
    return True


def _has_metadata(job: EncodingJob, index: int) -> bool:
    try:
        read_metadata(job.source.files[index], job.source.kind, job.settings.fps)
    except DataError:
        return False
    return True
