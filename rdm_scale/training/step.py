"""One training step on a global batch, and the values that are read of it.

A step reads nothing from the device: the loss of the global batch, the gradient norm and what ranks have to agree on
are copied to host memory together, and read when the device has come so far (`StepUnderWay.read`). A GPU then works on
the next step already. A loss or norm that is not finite is found in that reading, which precedes every save.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rdm_scale.batch import TrainingBatch
from rdm_scale.config import RunConfig
from rdm_scale.device import TimeMark, to_host
from rdm_scale.diffusion import Objective
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.parallel_model import ParallelModel
from rdm_scale.training.ema import ema_decay
from rdm_scale.training.non_finite import refuse_non_finite
from rdm_scale.training.optimizer import learning_rate
from rdm_scale.training.rank_status import RankStatus, StepStatistics


class StepResult(NamedTuple):
    """Result of a training step, the same on every rank but for its duration."""

    step: int  # steps completed, this one included
    loss: float  # mean over the global batch
    grad_norm: float  # of all gradients, before clipping
    lr: float
    size: tuple[int, ...]  # of the latents: T, H, W
    seconds: float  # from the wait for the batch to the last update, on the device
    statistics: StepStatistics


class StepUnderWay(NamedTuple):
    """Training step that has been given to the device; its values are in `values` when the device reaches `ended`."""

    step: int
    lr: float
    size: tuple[int, ...]
    ids: Tensor  # [B] of this rank's samples
    losses: Tensor  # [B] of them
    values: Tensor  # float64, on the host: those of StepStatistics, and the gradient norm
    began: TimeMark
    ended: TimeMark

    def read(self, mesh: Mesh, config: RunConfig) -> StepResult:
        """Wait for the values of the step, and read them. Collective where one of them is not finite.

        Raises:
            NonFiniteError: the loss or the gradient norm is not finite; on every rank.
        """
        self.ended.wait()
        *summed, grad_norm = self.values.tolist()
        statistics = StepStatistics(*summed)
        loss = statistics.loss_sum / mesh.replica_size / config.train.global_batch_size
        refuse_non_finite("loss", loss, self.step, self.ids, mesh, config, suspect_B=~self.losses.isfinite())
        refuse_non_finite("gradient norm", grad_norm, self.step, self.ids, mesh, config)
        seconds = self.ended.seconds_since(self.began)
        return StepResult(self.step, loss, grad_norm, self.lr, self.size, seconds, statistics)


def training_step(
    config: RunConfig,
    model: ParallelModel,
    objective: Objective,
    batch: TrainingBatch,
    step: int,
    status: RankStatus,
    began: TimeMark,
) -> StepUnderWay:
    """Train on this rank's samples of the global batch of step `step` (counted from 1). Collective.

    Where a gradient is not finite nothing is updated.

    Args:
        began: when the wait for the batch began.
    """
    # Forwards and backwards of all micro-batches.
    micro_batches = batch.split(config.train.micro_batch_size or len(batch))
    loss_B = model.accumulate(micro_batches, objective).double()

    # One all-reduce: the loss of the global batch, and what the ranks have to agree on.
    statistics = model.mesh.all_reduce_tensor(status.statistics(loss_B.sum()))

    # Clipping and AdamW, then EMA.
    lr = learning_rate(config.optimizer, step)
    grad_norm = model.step(lr)
    model.update_ema(ema_decay(config.optimizer, step))

    values = to_host(torch.cat([statistics, grad_norm.double().view(1)]))
    size = tuple(batch.latents.shape[2:])
    return StepUnderWay(step, lr, size, batch.ids, loss_B, values, began, TimeMark(model.mesh.device))
