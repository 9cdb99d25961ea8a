"""Preview of an encoding: some originals above their reconstructions by the codec."""

import io

import torch

from rdm_scale.encoding.job import EncodingJob
from rdm_scale.encoding.pixels import load_sample, reconstruct
from rdm_scale.encoding.planning import PlannedSample, split_files
from rdm_scale.errors import DataError
from rdm_scale.sampling.image_grid import image_grid, middle_frames
from rdm_scale.storage.location import Location


def write_preview(file: str, job: EncodingJob, columns: int) -> None:
    """Draw the first inputs of the training split, in its order, above their reconstructions, as a PNG.

    Raises:
        DataError: none of them can be decoded, or the file cannot be written.
    """
    files, bucket = job.source.files, job.settings.buckets[0]
    index = {one.key: number for number, one in enumerate(files)}
    originals, names = [], []
    for one in split_files(files, job.settings.seed, job.settings.holdout_share).train[:columns]:
        try:
            originals.append(load_sample(job.source, PlannedSample(index[one.key], 0, 0), bucket, job.settings))
        except DataError:  # it is listed in rejected.jsonl
            continue
        if one.label >= 0:
            names.append(job.source.class_names[one.label])
    if not originals:
        raise DataError(f"the data is encoded, but none of the first {columns} inputs can be drawn in a preview")
    pixels = torch.stack(originals)
    both = torch.cat([middle_frames(pixels), middle_frames(reconstruct(pixels, job.codec))])
    png = io.BytesIO()
    image_grid(both, len(originals), names).save(png, "PNG")
    try:
        Location(file).write(png.getvalue())
    except OSError as error:
        raise DataError(f"the data is encoded, but the preview {file} cannot be written: {error}") from None
