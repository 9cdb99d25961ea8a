"""Communication of a kept data-parallel step that its computation does not hide, by replay on links of three speeds.

In kept mode (`parallel.keep_gathered`) a step all-gathers the parameters once and reduce-scatters the gradients once.
*Before*, all are gathered, then all micro-batches run, then all gradients are reduced. *After* (`parallel.overlap`),
the parameters are divided into buckets: each is gathered in the order of the forward and waited for by its first block;
the last backward reduces each as soon as its last gradient is there. The exposed share is the part of the step in which
nothing is computed.

Nothing is sent: the replay takes block times that a GPU has measured and adds up. Its assumptions:

- The rate of a measured step (benchmarks/results/gpu.json; its optimizer included) holds for each block, the embeddings
  and the head: time is FLOPs of rdm_scale/cost.py over that rate, a backward takes two forwards. depth_8b has not been
  measured and is given the rate of depth_1b.
- A link is what one rank sends and receives on the data axis, whatever else uses it. A collective of n ranks moves
  (n - 1) / n of its bytes over each link, and starts log2 n latencies later; one collective runs at a time, and takes
  nothing from the computation beside it.
- A rank trains as many samples a step as its configuration says for the ranks that it is meant for, on any number of
  ranks. Its micro-batches follow each other without a pipeline bubble, in which more could be hidden.
- Parameters travel in the compute dtype, gradients in fp32 or, in the last column, bf16 (`parallel.reduce_dtype`).

Prints Markdown, writes benchmarks/results/overlap.json and docs/images/overlap.png.

    python benchmarks/overlap.py
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.report import IMAGES, ROOT, print_table, read_results, write_results
from rdm_scale import cost
from rdm_scale.config import RunConfig, load_config
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.parallel.plan import plan_parallelism

PICTURE = IMAGES / "overlap.png"
RANKS = (8, 64, 512)
GB_PER_S = (25, 50, 400)


class Part(NamedTuple):
    """Embeddings, a block or the head, as one rank holds it."""

    forward_s: float  # of one micro-batch
    backward_s: float
    parameters: int


class Link(NamedTuple):
    """Link of each of the ranks that take part in a collective."""

    ranks: int
    bytes_per_s: float
    latency_s: float = 0.0

    def seconds(self, size: float) -> float:
        """Duration of an all-gather to, or a reduce-scatter of, `size` bytes on every rank."""
        if self.ranks == 1:
            return 0.0
        share = (self.ranks - 1) / self.ranks
        return self.latency_s * math.log2(self.ranks) + share * size / self.bytes_per_s


class Sizes(NamedTuple):
    """Bytes of a parameter that is gathered, and of its gradient."""

    parameter: int = 2
    gradient: int = 4


class Replayed(NamedTuple):
    """Duration of forwards, backwards and the communication around them, and that of forwards and backwards alone."""

    seconds: float
    computed_s: float

    @property
    def exposed(self) -> float:
        """Share of the time in which nothing is computed."""
        return 1 - self.computed_s / self.seconds


class Case(NamedTuple):
    """Model and layout to replay."""

    title: str
    configuration: str
    ranks: int  # that the configuration is meant for
    rate_of: str  # prefix of the row of gpu.json whose TFLOP/s are used
    data_only: bool = False  # all ranks on the data axis, and one micro-batch, instead of the configured layout


CASES = (
    Case("dit_xl", "dit_xl", 8, "dit_xl 64"),
    Case("depth_8b, tensor 4 x pipeline 2", "depth_8b", 64, "depth_1b"),
    Case("depth_8b, data only, one micro-batch", "depth_8b", 64, "depth_1b", data_only=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bucket-mb", type=float, default=64, help="parameters of a bucket, in MB of the compute dtype"
    )
    parser.add_argument("--latency-us", type=float, default=10, help="latency of a hop between ranks")
    options = parser.parse_args()
    measured = read_results(str(ROOT / "benchmarks" / "gpu.py"))
    results = [
        replay_case(case, ranks, speed, options, rate_of(measured, case.rate_of))
        for case, ranks, speed in itertools.product(CASES, RANKS, GB_PER_S)
    ]
    report(results)
    kept = {"gpu": measured["gpu"], "bucket_mb": options.bucket_mb, "latency_us": options.latency_us}
    write_results(__file__, kept | {"replays": results})
    draw(results)


def rate_of(measured: dict[str, Any], prefix: str) -> float:
    """FLOP/s of the first measured row whose name begins so: rows are in the order of their importance."""
    rates = [row["tflops"] for name, row in measured.items() if name.startswith(prefix) and "tflops" in row]
    if not rates:
        raise SystemExit(f"benchmarks/results/gpu.json has no row {prefix!r}: run benchmarks/gpu.py first")
    return float(rates[0]) * 1e12


def replay_case(case: Case, ranks: int, gb_per_s: float, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    config = load_config(str(ROOT / "configs" / f"{case.configuration}.yaml"))
    share = config.train.global_batch_size // config.data_parallel_size(case.ranks)
    micro_batch = config.train.micro_batch_size or share
    micro_batches, model_parallel = share // micro_batch, config.parallel.tensor * config.parallel.pipeline
    if case.data_only:
        micro_batches, model_parallel = 1, 1
    parts = parts_of_rank(config, micro_batch, rate, case.data_only)
    compute = PRECISIONS[config.train.precision].bytes
    buckets = bucketed(parts, options.bucket_mb * 1e6 / compute)
    link = Link(max(1, ranks // model_parallel), gb_per_s * 1e9, options.latency_us * 1e-6)
    after = replay(buckets, micro_batches, link, Sizes(compute))
    return {
        "case": case.title,
        "ranks": ranks,
        "data": link.ranks,
        "gb_per_s": gb_per_s,
        "buckets": len(buckets),
        "micro_batches": micro_batches,
        "computed_s": after.computed_s,
        "before": replay_serial(parts, micro_batches, link, Sizes(compute)).exposed,
        "after": after.exposed,
        "after_bf16": replay(buckets, micro_batches, link, Sizes(compute, 2)).exposed,
    }


def parts_of_rank(config: RunConfig, samples: int, rate: float, data_only: bool) -> list[Part]:
    """Parts of the rank that holds the most parameters, in the order of the forward."""
    model, tensor = config.model, 1 if data_only else config.parallel.tensor
    blocks = list(range(model.depth))
    if not data_only and config.parallel.pipeline > 1:
        plan = plan_parallelism(config, config.parallel.tensor * config.parallel.pipeline, None)
        largest = max(range(config.parallel.pipeline), key=lambda rank: plan.stages[rank].parameters)
        blocks = [block for chunk in plan.placement.chunks_of(largest) for block in plan.blocks[chunk]]

    def part(flops: int, parameters: cost.Parameters) -> Part:
        forward_s = samples * flops / tensor / rate
        return Part(forward_s, 2 * forward_s, parameters.on_rank(tensor))

    parts = [part(cost.block_flops(model, block), cost.block_parameters(model, block)) for block in blocks]
    if 0 in blocks:
        parts.insert(0, part(cost.embedding_flops(model), cost.embedding_parameters(model)))
    if model.depth - 1 in blocks:
        parts.append(part(cost.head_flops(model), cost.head_parameters(model)))
    return parts


def bucketed(parts: Sequence[Part], parameters: float) -> list[list[Part]]:
    """Divide parts, in their order, into buckets: each is closed by the part with which it has so many parameters."""
    buckets: list[list[Part]] = [[]]
    for part in parts:
        if sum(each.parameters for each in buckets[-1]) >= parameters:
            buckets.append([])
        buckets[-1].append(part)
    return buckets


def replay(buckets: Sequence[Sequence[Part]], micro_batches: int, link: Link, sizes: Sizes) -> Replayed:
    """Step whose buckets are gathered and reduced beside the computation."""
    forwards = [sum(part.forward_s for part in bucket) for bucket in buckets]
    backwards = [sum(part.backward_s for part in bucket) for bucket in buckets]
    parameters = [sum(part.parameters for part in bucket) for bucket in buckets]
    now = link_free = 0.0
    for forward_s, count in zip(forwards, parameters, strict=True):
        link_free += link.seconds(sizes.parameter * count)
        now = max(now, link_free) + forward_s
    # What lies between the first forward and the last backward needs no communication.
    now += (micro_batches - 1) * (sum(forwards) + sum(backwards))
    for backward_s, count in zip(reversed(backwards), reversed(parameters), strict=True):
        now += backward_s
        link_free = max(now, link_free) + link.seconds(sizes.gradient * count)
    return Replayed(max(now, link_free), micro_batches * (sum(forwards) + sum(backwards)))


def replay_serial(parts: Sequence[Part], micro_batches: int, link: Link, sizes: Sizes) -> Replayed:
    """Step that gathers everything, computes, and reduces everything: that of one bucket."""
    return replay([list(parts)], micro_batches, link, sizes)


def report(results: Sequence[dict[str, Any]]) -> None:
    header = ("model", "ranks (data)", "GB/s a rank", "step without communication (s)", "buckets")
    rows = [
        (
            r["case"],
            f"{r['ranks']} ({r['data']})",
            r["gb_per_s"],
            f"{r['computed_s']:.3f}",
            r["buckets"],
            *(f"{r[name]:.1%}" for name in ("before", "after", "after_bf16")),
        )
        for r in results
    ]
    print_table((*header, "exposed before", "after", "after, bf16 gradients"), rows)


def draw(results: Sequence[dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(CASES), figsize=(13, 4), sharey=True, layout="constrained")
    for panel, case in zip(panels, CASES, strict=True):
        own = [r for r in results if r["case"] == case.title]
        names = [f"{r['ranks']}\n{r['gb_per_s']}" for r in own]
        places = list(range(len(own)))
        for shift, name, label in ((-0.2, "before", "before"), (0.2, "after", "after")):
            panel.bar([place + shift for place in places], [100 * r[name] for r in own], width=0.4, label=label)
        panel.set_xticks(places, names)
        panel.set_xlabel("ranks, and GB/s of a rank's link")
        panel.set_title(case.title, fontsize=10)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exposed communication (% of the step)")
    panels[0].legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
