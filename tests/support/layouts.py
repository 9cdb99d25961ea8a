"""Layouts of up to 8 ranks: all that are legal, and small sets that cover all pairs of options."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

BATCH, DEPTH, HEADS = 24, 9, 8
MESHES = [(t, p, 8 // t // p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if t * p <= 8]
MESHES += [(1, 1, 3), (2, 1, 3), (1, 2, 3)]  # uneven ZeRO ranges
ZERO = ["0", "1", "2", "3 kept", "3 by block"]
SCHEDULES = ["1f1b", "interleaved_1f1b", "v_1f1b"]
RECOMPUTE = ["none", "full", "selective", "every_2"]


class Case(NamedTuple):
    tensor: int
    pipeline: int
    data: int
    zero: str
    schedule: str
    recompute: str
    sequence: bool
    overlap: bool = True
    shard_size: int | None = None
    offload: str = "none"

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches, odd where the schedule and the batch allow."""
        if self.schedule == "interleaved_1f1b":
            return self.pipeline
        return 3 if BATCH // self.data % 3 == 0 else 4

    def changes(self) -> dict[str, Any]:
        """Configuration keys, as small_runs.run_config takes them."""
        stage, _, gathering = self.zero.partition(" ")
        return MODEL | {
            "train__micro_batch_size": BATCH // self.data // self.micro_batches,
            "parallel__tensor": self.tensor,
            "parallel__pipeline": self.pipeline,
            "parallel__zero_stage": int(stage),
            "parallel__keep_gathered": {"": "auto", "kept": "always", "by block": "never"}[gathering],
            "parallel__schedule": self.schedule,
            "parallel__recompute": self.recompute,
            "parallel__sequence": self.sequence,
            "parallel__overlap": self.overlap,
            "parallel__shard_size": self.shard_size,
            "parallel__offload": self.offload,
        }

    def __str__(self) -> str:
        sharding = f" in groups of {self.shard_size}" if self.shard_size else ""
        sequence = "sequence, " if self.sequence else ""
        return (
            f"tp{self.tensor} pp{self.pipeline} dp{self.data}, ZeRO {self.zero}{sharding}, {sequence}"
            f"{self.schedule}, recompute {self.recompute}{'' if self.overlap else ', no overlap'}"
            f"{'' if self.offload == 'none' else ', offload'}"
        )


MODEL: dict[str, Any] = {
    "model__depth": DEPTH,
    "model__num_heads": HEADS,
    "train__global_batch_size": BATCH,
    "train__steps": 10,
    "optimizer__grad_clip": 1.5,
}


def legal() -> list[Case]:
    cases = (Case(*mesh, *rest) for mesh in MESHES for rest in itertools.product(ZERO, SCHEDULES, RECOMPUTE, (0, 1)))
    return [
        case._replace(sequence=bool(case.sequence))
        for case in cases
        if not (case.sequence and case.tensor == 1)
        and not (case.schedule != "1f1b" and not 1 < case.pipeline <= DEPTH // 2)
    ]


def covering(first: Iterable[Case] = ()) -> list[Case]:
    """A small set of cases that contains `first`, every mesh, and every two options that can occur together."""
    candidates = legal()
    missing = set().union(*map(_pairs, candidates))
    chosen = list(first)
    for case in chosen:
        missing -= _pairs(case)
    while missing:
        best = max(candidates, key=lambda case: (len(_pairs(case) & missing), -case.tensor * case.pipeline))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def apart() -> list[Case]:
    """Cases of options that act on the data-parallel axis alone, beside those whose pairs are covered."""
    return [
        Case(1, 1, 4, "3 kept", "1f1b", "none", False, shard_size=2),
        Case(1, 1, 4, "3 by block", "1f1b", "none", False, shard_size=2),
        Case(1, 2, 2, "3 kept", "v_1f1b", "none", False, overlap=False, offload="optimizer"),
    ]


def full() -> list[Case]:
    """Every mesh with ZeRO 1 and 3, and further cases until all pairs are covered."""
    simple = [Case(*mesh, zero, "1f1b", "none", False) for mesh in MESHES for zero in ("1", "3 kept")]
    return covering(simple) + apart()


def _pairs(case: Case) -> set[Any]:
    """Pairs of options; of a size counts only if it is above 1 and, for data, if it divides evenly."""
    data = "uneven" if case.data == 3 else case.data > 1
    options: dict[str, Any] = dict(zip(case._fields[:7], case, strict=False))
    options |= {"tensor": case.tensor > 1, "pipeline": case.pipeline > 1, "data": data}
    return {case[:3], *itertools.combinations(options.items(), 2)}
