"""Estimated gain of a zero-bubble schedule, which defers the gradients of weights, over 1F1B (arXiv 2401.10241).

Zero-bubble schedules split a backward into the gradient of its input (B), which the previous stage waits for, and that
of its weights (W), which fills idle time. The split has a cost: this measures forward, full backward, B and W of a
stage of blocks with the functions of torch.distributed.pipelining, alternating, and simulates both schedules with the
measured times. Prints tables and writes benchmarks/results/zero_bubble.json.

    OMP_NUM_THREADS=1 python benchmarks/zero_bubble.py --rounds 20
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from benchmarks.report import print_table, write_results
from rdm_scale.config import ModelConfig
from rdm_scale.models import build_model
from rdm_scale.models.blocks import Conditioning
from rdm_scale.parallel.pipeline.schedules import ChunkCost, build_schedule, place_chunks, simulate
from rdm_scale.parallel.recompute import checkpoint_activations

GRID = (1, 16, 16)
Times = dict[str, float]  # seconds of F, full backward, B and W


class Blocks(nn.Module):
    """Three blocks of DiT-S as one pipeline stage."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        self.blocks = build_model(ModelConfig(hidden_size=384, depth=3, num_heads=6)).blocks
        checkpoint_activations(self.blocks.values(), recompute)

    def forward(self, z_SBD: Tensor, condition_BD: Tensor) -> Tensor:
        for block in self.blocks.values():
            z_SBD = block(z_SBD, Conditioning(condition_BD, GRID))
        return z_SBD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    result: dict[str, object] = {"torch": torch.__version__, "rounds": rounds}
    times = {recompute: measure(Blocks(recompute), rounds) for recompute in ("none", "full")}
    rows: list[tuple[object, ...]] = []
    for recompute, of in times.items():
        split = (of["B"] + of["W"]) / of["backward"]
        cells = [f"{of[name] * 1e3:.1f}" for name in ("F", "backward", "B", "W")]
        rows.append((recompute, *cells, f"{split:.2f}"))
        result[recompute] = of | {"step_time_of_1f1b": {f"p{p} m{m}": gain(p, m, of) for p, m in SIZES}}
    print_table(("recompute", "F (ms)", "backward", "B", "W", "(B + W) / backward"), rows)
    rows = [
        (p, m, recompute, f"{(p - 1) / (m + p - 1):.1%}", f"{gain(p, m, of):.3f}")
        for p, m in SIZES
        for recompute, of in times.items()
    ]
    header = ("stages", "micro-batches", "recompute", "1F1B bubble", "zero-bubble step / 1F1B step")
    print_table(header, rows)
    write_results(__file__, result)


SIZES = [(2, 4), (2, 8), (4, 8), (4, 16), (4, 32), (8, 16), (8, 32), (8, 64)]


def measure(model: Blocks, rounds: int) -> Times:
    z = torch.randn(64, 4, 384)
    condition = torch.randn(4, 384)
    gradient = torch.randn_like(z)
    times: dict[str, list[float]] = {name: [] for name in ("F", "backward", "B", "W")}

    def timed(name: str, work: object) -> object:
        began = time.perf_counter()
        done = work()  # type: ignore[operator]
        times[name].append(time.perf_counter() - began)
        return done

    for _ in range(rounds + 2):
        inputs = [z.clone().requires_grad_(), condition.clone().requires_grad_()]
        out = timed("F", lambda i=inputs: model(*i))
        timed("backward", lambda o=out: torch.autograd.backward([o], [gradient]))
        inputs = [z.clone().requires_grad_(), condition.clone().requires_grad_()]
        out = model(*inputs)
        _, groups = timed("B", lambda o=out, i=inputs: stage_backward_input([o], [gradient], i, model.parameters()))  # type: ignore[misc,arg-type]
        timed("W", lambda g=groups: stage_backward_weight(model.parameters(), g))
        model.zero_grad()
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def gain(p: int, m: int, times: Times) -> float:
    """Ratio of the zero-bubble schedule's step time to that of 1F1B."""
    place = place_chunks("1f1b", p, 1)
    orders = build_schedule("1f1b", place, m)
    busy = m * (times["F"] + times["backward"])
    one_f_one_b = busy / (1 - simulate(orders, place, lambda chunk: ChunkCost(times["F"], times["backward"])).bubble)
    return zero_bubble(p, m, times) / one_f_one_b


def zero_bubble(p: int, m: int, times: Times) -> float:
    """Step time when an idle rank takes B before F before W, with 1F1B's limit on micro-batches kept (ZB-H1)."""
    ends: dict[tuple[str, int, int], float] = {}
    done = [{"F": 0, "B": 0, "W": 0} for _ in range(p)]
    free = [0.0] * p
    while any(d["W"] < m for d in done):
        best: tuple[float, int, int, str] | None = None
        for rank, d in enumerate(done):
            ready = {"W": free[rank]} if d["W"] < d["B"] else {}
            if d["F"] < m and d["F"] - d["W"] < p - rank + 1:
                ready["F"] = ends.get(("F", rank - 1, d["F"]), 0.0 if rank == 0 else float("inf"))
            if d["B"] < d["F"]:
                source = ("B", rank + 1, d["B"]) if rank < p - 1 else ("F", rank, d["B"])
                ready["B"] = ends.get(source, float("inf"))
            for kind, at in ready.items():
                candidate = (max(at, free[rank]), "BFW".index(kind), rank, kind)
                best = candidate if best is None else min(best, candidate)
        assert best is not None
        begin, _, rank, kind = best
        free[rank] = ends[kind, rank, done[rank][kind]] = begin + times[kind]
        done[rank][kind] += 1
    return max(free)


if __name__ == "__main__":
    main()
