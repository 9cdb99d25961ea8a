"""One training step on a global batch."""

from typing import NamedTuple

from rdm_scale.batch import TrainingBatch
from rdm_scale.config import RunConfig
from rdm_scale.diffusion import Objective
from rdm_scale.parallel.parallel_model import ParallelModel
from rdm_scale.training.ema import ema_decay
from rdm_scale.training.non_finite import refuse_non_finite
from rdm_scale.training.optimizer import learning_rate
from rdm_scale.training.rank_status import RankStatus, StepStatistics


class StepResult(NamedTuple):
    """Result of a training step, the same on every rank."""

    step: int  # steps completed, this one included
    loss: float  # mean over the global batch
    grad_norm: float  # of all gradients, before clipping
    lr: float
    size: tuple[int, ...]  # of the latents: T, H, W
    statistics: StepStatistics


def training_step(
    config: RunConfig, model: ParallelModel, objective: Objective, batch: TrainingBatch, step: int, status: RankStatus
) -> StepResult:
    """Train on this rank's samples of the global batch of step `step` (counted from 1). Collective.

    Raises:
        NonFiniteError: on every rank, before anything is updated.
    """
    # Forwards and backwards of all micro-batches.
    micro_batches = batch.split(config.train.micro_batch_size or len(batch))
    loss_B = model.accumulate(micro_batches, objective).double()

    # One all-reduce: the loss of the global batch, and what the ranks have to agree on.
    statistics = status.statistics(loss_B.sum().item()).all_reduce(model.mesh)
    loss = statistics.loss_sum / model.mesh.replica_size / config.train.global_batch_size
    refuse_non_finite("loss", loss, step, batch, model.mesh, config, suspect_B=~loss_B.isfinite())

    # Clipping and AdamW, then EMA.
    lr = learning_rate(config.optimizer, step)
    grad_norm = model.step(lr)
    refuse_non_finite("gradient norm", grad_norm, step, batch, model.mesh, config)
    model.update_ema(ema_decay(config.optimizer, step))
    return StepResult(step, loss, grad_norm, lr, tuple(batch.latents.shape[2:]), statistics)
