"""Throughput of a run: samples/s, TFLOP/s and model FLOPs utilization (MFU), and what a run may reach at best.

FLOPs are the model's own (rdm_scale.cost): three forwards a sample, whatever is recomputed. MFU is their rate as a
share of a peak (PaLM, arXiv 2204.02311, appendix B): `monitor.peak_tflops`, or else the rate of a large matrix product
in the compute dtype, which a GPU is given before the run starts. A CPU has no peak unless it is stated.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdm_scale import cost
from rdm_scale.config import RunConfig
from rdm_scale.parallel.plan import ParallelPlan

if TYPE_CHECKING:
    import torch  # takes seconds to import, and a dry run measures nothing


@dataclass(frozen=True)
class Peak:
    """Rate that one rank's device could reach.

    Attributes:
        source: how it is known, for messages.
    """

    tflops: float
    source: str


def stated_peak(config: RunConfig) -> Peak | None:
    """Peak as `monitor.peak_tflops` states it."""
    stated = config.monitor.peak_tflops
    return None if stated is None else Peak(stated, "monitor.peak_tflops")


def find_peak(config: RunConfig, device: "torch.device") -> Peak | None:
    """Peak as it is stated, else measured on a GPU; None on a CPU."""
    from rdm_scale.device import matmul_tflops
    from rdm_scale.dtypes import PRECISIONS

    if config.monitor.peak_tflops is not None or device.type != "cuda":
        return stated_peak(config)
    tflops = matmul_tflops(device, PRECISIONS[config.train.precision].torch)
    return Peak(tflops, f"measured by a {config.train.precision} matrix product on this GPU")


class Throughput:
    """Rates of steps.

    Args:
        ranks: number of all ranks.
        peak: of each; None: not known.
    """

    def __init__(self, config: RunConfig, ranks: int, peak: Peak | None) -> None:
        self.config, self.ranks, self.peak = config, ranks, peak
        self._flops: dict[tuple[int, ...], int] = {}  # of a sample, by its size

    def rates(self, size: tuple[int, ...], seconds: float) -> dict[str, float]:
        """Metrics of a step of `seconds` on a global batch of latents of one size (T, H, W)."""
        samples_per_s = self.config.train.global_batch_size / seconds
        if size not in self._flops:
            self._flops[size] = 3 * cost.model_flops(self.config.model, size)
        tflops = self._flops[size] * samples_per_s / self.ranks / 1e12
        rates = {"samples_per_s": samples_per_s, "tflops_per_rank": tflops}
        return rates if self.peak is None else rates | {"mfu": tflops / self.peak.tflops}


def best_case(config: RunConfig, plan: ParallelPlan, peak: Peak, steps: int) -> str:
    """Line that says how long `steps` steps take at least.

    All FLOPs of a step, recomputation included, at the peak, and the predicted bubble of the pipeline. Everything else
    that takes time (communication, the optimizer, kernels that multiply no matrices) is left out.
    """
    samples, ranks = config.train.global_batch_size, plan.tensor * plan.pipeline * plan.data
    flops = samples * (3 * cost.model_flops(config.model) + cost.recomputed_flops(config))
    seconds = flops / ranks / (1e12 * peak.tflops) / (1 - plan.bubble)
    return (
        f"estimate: at best {_significant(seconds)} s a step, {_significant(samples / seconds)} samples/s and "
        f"{clock_time(steps * seconds)} for {steps:,} steps, if all {flops / 1e12:,.1f} TFLOP of a step ran at "
        f"{_significant(peak.tflops)} TFLOP/s a rank ({peak.source})"
        + (f" with the predicted bubble of {plan.bubble:.1%}" if plan.bubble else "")
    )


def clock_time(seconds: float) -> str:
    """Duration as hours:minutes:seconds."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _significant(value: float) -> str:
    """Number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
