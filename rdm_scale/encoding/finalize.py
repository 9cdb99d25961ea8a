"""Completion of a job: manifests, list of rejected inputs and statistics, from the records of all shards."""

import base64
import json

import torch

from rdm_scale.data.captions import pack_text
from rdm_scale.data.manifest import MANIFEST_NAME, Manifest, ManifestHeader, TextEncoding
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.encoding.job import EncodingJob, EncodingResult
from rdm_scale.encoding.moments import MomentAccumulator
from rdm_scale.encoding.planning import SPLITS, EncodingPlan, PlannedShard, Split
from rdm_scale.encoding.records import RecordStore, ShardRecord
from rdm_scale.encoding.rejections import Rejection, unreadable_message
from rdm_scale.encoding.remarks import Remarks
from rdm_scale.encoding.shared_plan import SharedPlan
from rdm_scale.errors import DataError, StorageError

Records = dict[PlannedShard, ShardRecord]
Rejections = dict[int, Rejection]  # by index of the input


def finalize(job: EncodingJob, plan: EncodingPlan, store: RecordStore) -> EncodingResult:
    """Write the manifests and the list of rejected inputs. The records stay, for a repetition of the job.

    Raises:
        DataError: too many inputs are rejected, a split is empty, or a shard that was written is missing.
    """
    records = {shard: store.read(shard) for shard in plan.shards}
    _check_files(job, records, store)
    rejected = _rejected_inputs(plan, records)
    _write_rejected(job, rejected)
    _check_shares(job, rejected)
    manifests = {split: _manifest(job, records, split, len(rejected)) for split in job.output.by_split}
    for split in reversed(SPLITS):  # the training split last: its manifest marks the job as complete
        if split in manifests:
            (job.output.by_split[split] / MANIFEST_NAME).write(manifests[split].to_json())
    moments = MomentAccumulator()
    for shard, record in records.items():
        if shard.split == "train":
            moments.add_sums(record.count, record.total, record.squares)
    truncated = sum(record.truncated for record in records.values())
    remarks = Remarks()
    for record in records.values():
        remarks.include(record.remarks)
    return EncodingResult(
        manifests["train"], manifests.get("holdout"), float(moments.mean), float(moments.std), truncated, remarks
    )


def _check_shares(job: EncodingJob, rejected: Rejections) -> None:
    """Raise DataError if more inputs than allowed are rejected, after the next run has been made to look again."""
    total = len(job.source.files)
    damaged = [one.reason for one in rejected.values() if one.cause == "content"]
    unreadable = [one.reason for one in rejected.values() if one.cause == "storage"]
    if len(unreadable) > job.max_unreadable * total:
        SharedPlan.remove(job.output.work)
        raise StorageError(unreadable_message(unreadable[0], len(unreadable), job.max_unreadable))
    if len(damaged) > job.max_rejected * total:
        SharedPlan.remove(job.output.work)
        raise DataError(
            f"{len(damaged)} of {total} inputs cannot be encoded, more than a share of {job.max_rejected}: see "
            f"{job.output.rejected}. The first: {damaged[0]}. Repair or remove them, or raise --max-rejected, and run "
            "the same command again: it keeps the shards that are done"
        )


def _check_files(job: EncodingJob, records: Records, store: RecordStore) -> None:
    """Check that all recorded shards are still there, and remove those of earlier plans."""
    found = {split: job.output.shard_files(split) for split in job.output.by_split}
    for planned, record in records.items():
        for tar in (record.shard, record.shard.text) if record.shard else ():
            if tar is not None and found[planned.split].pop(tar.name, None) != tar.bytes:
                store.remove(planned)
                raise DataError(
                    f"{job.output.by_split[planned.split] / tar.name} was written, but is now missing or "
                    "incomplete: run the same command again to encode it again"
                )
    for split, unknown in found.items():
        for name in unknown:
            (job.output.by_split[split] / name).remove()


def _rejected_inputs(plan: EncodingPlan, records: Records) -> Rejections:
    """Inputs with at least one sample that could not be encoded, and the first reason of each."""
    rejected = dict(plan.rejected)
    for planned, record in records.items():
        for one in record.rejected:
            rejected.setdefault(planned.samples[one.position].file, Rejection(one.reason, one.cause))
    return dict(sorted(rejected.items()))


def _write_rejected(job: EncodingJob, rejected: Rejections) -> None:
    file = job.output.rejected
    if rejected:
        lines = [{"input": job.source.files[index].name, **one._asdict()} for index, one in rejected.items()]
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    elif file.exists():  # from an earlier run, before the inputs were repaired
        file.remove()


def _manifest(job: EncodingJob, records: Records, split: Split, rejected: int) -> Manifest:
    shards = [record.shard for planned, record in records.items() if planned.split == split and record.shard]
    if not shards:
        raise DataError(f"none of the inputs of the {split} split could be encoded: see {job.output.rejected}")
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
        rejected=rejected if split == "train" else 0,
        shards=tuple(s.model_copy(update={"shape": None}) if s.shape == shape else s for s in shards),
    )


def _text_encoding(job: EncodingJob) -> TextEncoding | None:
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
