"""Status of a rank, and the statistics of a step that all ranks sum in one all-reduce.

They stay on the device until the values of the step are read, see training.step.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rdm_scale.checkpoint import Saver
from rdm_scale.data.lost_shards import LostShards
from rdm_scale.device import to_device
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.stop_request import StopRequest


class StepStatistics(NamedTuple):
    """Sums over all ranks of what each of them knows of a step."""

    loss_sum: float  # of the losses of this rank's samples; ranks of a model replica share samples
    stop_requests: float  # 1 on a rank that was asked to stop
    data_wait_s: float  # this rank's share of the mean
    lost_shards: float  # shards lost since the last step
    saving: float  # 1 on a rank whose part of a checkpoint is still being written


@dataclass
class RankStatus:
    """State of this rank that it shares with the others in each step.

    Attributes:
        lost: None on ranks that read no data.
        stop: set by a signal.
        data_wait_s: time for which this step waited for its batch.
        warnings: one for each shard that this rank lost and has not yet reported to the others.
    """

    mesh: Mesh
    saver: Saver
    lost: LostShards | None
    stop: StopRequest = field(default_factory=StopRequest)
    data_wait_s: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def statistics(self, loss_sum: Tensor) -> Tensor:
        """Values of StepStatistics, float64 [5], of the step under way on this rank's device, after its backwards."""
        if self.lost is not None:
            self.warnings += self.lost.take_warnings()
        values = StepStatistics(
            loss_sum=0.0,  # is on the device
            stop_requests=float(self.stop.requested),
            data_wait_s=self.data_wait_s / self.mesh.world_size,
            lost_shards=float(len(self.warnings)),
            saving=float(self.saver.busy),
        )
        on_device = to_device(torch.tensor(values[1:], dtype=torch.float64), self.mesh.device)
        return torch.cat([loss_sum.double().view(1), on_device])

    def take_warnings(self) -> list[str]:
        """Warnings to report to the other ranks, once."""
        warnings, self.warnings = self.warnings, []
        return warnings
