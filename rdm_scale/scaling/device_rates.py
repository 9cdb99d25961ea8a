"""Rates of devices, by which the run planner predicts step times: measured where possible, and links as assumptions.

`device_rates.json` has one entry a device, with the source of each figure beside it.
"""

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from rdm_scale.errors import ConfigError


@dataclass(frozen=True)
class Network:
    """Links of the ranks of one collective.

    Attributes:
        bytes_per_s: each way, of every rank.
        latency_s: of a hop; a collective of n ranks starts log2 n of them later.
    """

    ranks: int
    bytes_per_s: float
    latency_s: float

    def seconds(self, size: float) -> float:
        """Duration of an all-gather to or reduce-scatter of `size` bytes on every rank; (n - 1) / n of them move."""
        if self.ranks == 1:
            return 0.0
        return self.latency_s * math.log2(self.ranks) + size * (self.ranks - 1) / self.ranks / self.bytes_per_s


@dataclass(frozen=True)
class DeviceRates:
    """Rates of one device in bf16, and of the links between devices.

    Attributes:
        memory_gib: memory that a rank may use.
        peak_tflops: of a large matrix product; MFU is a share of it.
        tflops: model FLOPs, three forwards a sample, over the time of forward and backward, by `parallel.recompute`.
        block_s: time that a block's forward and backward take beside their FLOPs, at any size.
        host_block_s: time until Python has issued a block's forward and backward, where no graph is replayed.
        host_by_block_s: the same under ZeRO-3 by block.
        memory_gb_per_s: of kernels that pass over parameters or gradients once.
        update_s: clipping, AdamW, EMA and publication, a parameter.
        elementwise_share: share of a block's time that only sequence parallelism divides over tensor-parallel ranks.
        node_gpus: devices that are joined by `node_gb_per_s`; beyond them each has `network_gb_per_s`.
        sources: of each figure, in words.
    """

    memory_gib: float
    peak_tflops: float
    tflops: dict[str, float]
    block_s: float
    host_block_s: float
    host_by_block_s: float
    memory_gb_per_s: float
    update_s: float
    elementwise_share: float
    node_gpus: int
    node_gb_per_s: float
    network_gb_per_s: float
    latency_s: float
    sources: dict[str, str]

    def flops_per_s(self, recompute: str) -> float:
        """Model FLOP/s under a policy of `parallel.recompute`; with every_N, an N-th of the time `full` adds."""
        none = self.tflops["none"]
        if recompute.startswith("every_"):
            share = 1 / int(recompute.removeprefix("every_"))
            return 1e12 / ((1 - share) / none + share / self.tflops["full"])
        return 1e12 * self.tflops[recompute]

    def network(self, ranks: int, stride: int) -> Network:
        """Links of a collective of every `stride`-th rank.

        Where a node holds several of its ranks, each of them takes a part of what crosses the network.
        """
        speed = self.node_gb_per_s
        if ranks * stride > self.node_gpus:
            speed = min(speed, self.network_gb_per_s * max(1, self.node_gpus // stride))
        return Network(ranks, 1e9 * speed, self.latency_s)


def devices() -> dict[str, Any]:
    """Content of the file of rates, by device."""
    tree: dict[str, Any] = json.loads(
        files("rdm_scale.scaling").joinpath("device_rates.json").read_text(encoding="utf-8")
    )
    return tree


def rates_of(device: str) -> DeviceRates:
    """Rates of a device.

    Raises:
        ConfigError: there are none for it.
    """
    known = devices()
    if device not in known:
        raise ConfigError(f"there are no rates for the device {device!r}: choose {' or '.join(sorted(known))}")
    return DeviceRates(**known[device])
