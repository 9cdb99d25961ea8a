"""Communication of a kept data-parallel step that its computation does not hide, by replay on links of three speeds.

In kept mode (`parallel.keep_gathered`) a step all-gathers the parameters once and reduce-scatters the gradients once.
*Before*, all are gathered, then all micro-batches run, then all gradients are reduced. *After* (`parallel.overlap`),
the parameters are divided into buckets as rdm_scale/parallel/zero/buckets.py does: one of what lies outside of the
blocks, gathered first and reduced last, and buckets of blocks, gathered in the order of the forward and waited for by
their first block; the last backward reduces each as soon as its last gradient is there. The exposed share is the part
of the step in which nothing is computed.

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
    """Block as one rank holds it; the first also computes the embeddings, the last the head."""

    forward_s: float  # of one micro-batch
    backward_s: float
    parameters: int


class Stage(NamedTuple):
    """Blocks of one rank, and the number of its parameters outside of them."""

    blocks: list[Part]
    outside: int


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
        return max(0.0, 1 - self.computed_s / self.seconds)  # sums of floating-point numbers


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
        "--bucket",
        type=int,
        default=2**25,
        help="parameters of a bucket at most (or an eighth of all, if that is less)",
    )
    parser.add_argument("--latency-us", type=float, default=10, help="latency of a hop between ranks")
    options = parser.parse_args()
    measured = read_results(str(ROOT / "benchmarks" / "gpu.py"))
    results = [
        replay_case(case, ranks, speed, options, rate_of(measured, case.rate_of))
        for case, ranks, speed in itertools.product(CASES, RANKS, GB_PER_S)
    ]
    report(results)
    kept = {"gpu": measured["gpu"], "bucket": options.bucket, "latency_us": options.latency_us}
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
    stage = stage_of_rank(config, micro_batch, rate, case.data_only)
    parameters = stage.outside + sum(block.parameters for block in stage.blocks)
    buckets = bucketed(stage.blocks, min(options.bucket, parameters // 8))
    compute = PRECISIONS[config.train.precision].bytes
    link = Link(max(1, ranks // model_parallel), gb_per_s * 1e9, options.latency_us * 1e-6)
    after = replay(buckets, stage.outside, micro_batches, link, Sizes(compute))
    return {
        "case": case.title,
        "ranks": ranks,
        "data": link.ranks,
        "gb_per_s": gb_per_s,
        "buckets": 1 + len(buckets),
        "micro_batches": micro_batches,
        "computed_s": after.computed_s,
        "before": replay_serial(stage, micro_batches, link, Sizes(compute)).exposed,
        "after": after.exposed,
        "after_bf16": replay(buckets, stage.outside, micro_batches, link, Sizes(compute, 2)).exposed,
    }


def stage_of_rank(config: RunConfig, samples: int, rate: float, data_only: bool) -> Stage:
    """Stage of the rank that holds the most parameters; `samples` are those of a micro-batch."""
    model, tensor = config.model, 1 if data_only else config.parallel.tensor
    blocks = list(range(model.depth))
    if not data_only and config.parallel.pipeline > 1:
        plan = plan_parallelism(config, config.parallel.tensor * config.parallel.pipeline, None)
        largest = max(range(config.parallel.pipeline), key=lambda rank: plan.stages[rank].parameters)
        blocks = [block for chunk in plan.placement.chunks_of(largest) for block in plan.blocks[chunk]]
    flops = {block: cost.block_flops(model, block) for block in blocks}
    outside = cost.NO_PARAMETERS
    if 0 in blocks:
        outside += cost.embedding_parameters(model)
        flops[0] += cost.embedding_flops(model)
    if model.depth - 1 in blocks:
        outside += cost.head_parameters(model)
        flops[model.depth - 1] += cost.head_flops(model)

    def part(block: int) -> Part:
        forward_s = samples * flops[block] / tensor / rate
        return Part(forward_s, 2 * forward_s, cost.block_parameters(model, block).on_rank(tensor))

    return Stage([part(block) for block in blocks], outside.on_rank(tensor))


def bucketed(blocks: Sequence[Part], parameters: float) -> list[list[Part]]:
    """Divide blocks, in their order, into buckets of at most so many parameters, or of one block."""
    buckets: list[list[Part]] = []
    for block in blocks:
        if not buckets or sum(each.parameters for each in buckets[-1]) + block.parameters > parameters:
            buckets.append([])
        buckets[-1].append(block)
    return buckets


def replay(buckets: Sequence[Sequence[Part]], outside: int, micro_batches: int, link: Link, sizes: Sizes) -> Replayed:
    """Step whose buckets are gathered and reduced beside the computation; `outside` parameters are in no block."""
    forwards = [sum(block.forward_s for block in bucket) for bucket in buckets]
    backwards = [sum(block.backward_s for block in bucket) for bucket in buckets]
    parameters = [sum(block.parameters for block in bucket) for bucket in buckets]
    now = link_free = link.seconds(sizes.parameter * outside)
    for forward_s, count in zip(forwards, parameters, strict=True):
        link_free += link.seconds(sizes.parameter * count)
        now = max(now, link_free) + forward_s
    # What lies between the first forward and the last backward needs no communication.
    now += (micro_batches - 1) * (sum(forwards) + sum(backwards))
    for backward_s, count in zip(reversed(backwards), reversed(parameters), strict=True):
        now += backward_s
        link_free = max(now, link_free) + link.seconds(sizes.gradient * count)
    link_free = max(now, link_free) + link.seconds(sizes.gradient * outside)
    return Replayed(link_free, micro_batches * (sum(forwards) + sum(backwards)))


def replay_serial(stage: Stage, micro_batches: int, link: Link, sizes: Sizes) -> Replayed:
    """Step that gathers everything, computes, and reduces everything."""
    everything = stage.outside + sum(block.parameters for block in stage.blocks)
    computed_s = micro_batches * sum(block.forward_s + block.backward_s for block in stage.blocks)
    communicated_s = link.seconds(sizes.parameter * everything) + link.seconds(sizes.gradient * everything)
    return Replayed(computed_s + communicated_s, computed_s)


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
