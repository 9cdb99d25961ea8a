"""Refusal to train on from a loss or gradient that is not finite."""

import json
import math
from pathlib import Path

from torch import Tensor

from rdm_scale.config import RunConfig
from rdm_scale.errors import NonFiniteError
from rdm_scale.parallel.mesh import Mesh


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
        NonFiniteError: on every rank; names the suspect samples, which are listed in the run's directory.
    """
    if math.isfinite(value):
        return
    suspects = ids_B if suspect_B is None else ids_B[suspect_B]
    samples = [number for ids in mesh.all_gather_object(suspects.tolist()) for number in ids]
    path = Path(config.run.dir) / f"non_finite_step_{step:08d}.json"
    if mesh.is_first:
        path.write_text(json.dumps({"step": step, "what": quantity, "sample_ids": samples}))
    shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    raise NonFiniteError(
        f"the {quantity} of step {step} is {value}, on the samples with ids {shown} (all in {path}); nothing "
        f"was saved after step {step - 1}. Look at those samples, or lower optimizer.lr or optimizer.grad_clip"
    )
