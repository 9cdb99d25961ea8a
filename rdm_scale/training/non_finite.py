"""Refusal to train on from a loss or gradient that is not finite."""

import json
import math
from pathlib import Path

from torch import Tensor

from rdm_scale.checkpoint.format.finite import shown
from rdm_scale.config import RunConfig
from rdm_scale.errors import NonFiniteError
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.parallel_model import ParallelModel


def refuse_non_finite(
    quantity: str,
    value: float,
    step: int,
    ids_B: Tensor,
    mesh: Mesh,
    config: RunConfig,
    suspect_B: Tensor | None = None,
) -> None:
    """Check a value that all ranks share; collective where it is not finite.

    Args:
        ids_B: ids of this rank's samples of the step.
        suspect_B: True for the samples of this rank that may be the cause; None: all (a gradient does not say).

    Raises:
        NonFiniteError: on every rank; names the suspect samples, which are listed in the run's directory, unless all
            samples of the batch are suspects.
    """
    if math.isfinite(value):
        return
    suspects = ids_B if suspect_B is None else ids_B[suspect_B]
    gathered = mesh.all_gather_object((suspects.tolist(), len(ids_B)))
    samples = list(dict.fromkeys(number for ids, _ in gathered for number in ids))  # ranks of a replica share samples
    path = Path(config.run.dir) / f"non_finite_step_{step:08d}.json"
    if mesh.is_first:
        path.write_text(json.dumps({"step": step, "what": quantity, "sample_ids": samples}))
    if suspect_B is not None and all(len(ids) == count for ids, count in gathered):
        whose = f"on every sample of the batch (ids in {path})"
        advice = "That is not the samples' fault: lower optimizer.lr or optimizer.grad_clip, or lengthen the warm-up"
    else:
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        whose = f"on the samples with ids {shown} (all in {path})"
        advice = "Look at those samples, or lower optimizer.lr or optimizer.grad_clip"
    raise NonFiniteError(
        f"the {quantity} of step {step} is {value}, {whose}; nothing was saved after step {step - 1}. {advice}"
    )


def refuse_non_finite_weights(model: ParallelModel) -> None:
    """Check the master weights of all ranks, after a loss or norm that is not finite. Collective.

    Raises:
        NonFiniteError: on every rank; names the parameters.
    """
    own, begin = list[str](), 0
    for flat in model.state().weights:
        held = [each for each in model.ranges if begin <= each.start < begin + flat.numel()]
        parts = {each.name: flat.flatten()[each.start - begin :][: each.numel] for each in held}
        own += [name for name, part in parts.items() if not part.isfinite().all()]
        begin += flat.numel()
    names = list(dict.fromkeys(name for each in model.mesh.all_gather_object(own) for name in each))
    if names:
        raise NonFiniteError(
            f"the weights of {shown(names)} hold NaN or infinity: an update made them so, and no sample did. Go back "
            "to an earlier checkpoint, with a lower optimizer.lr or optimizer.grad_clip, or a longer warm-up"
        )
