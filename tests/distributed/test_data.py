"""Data on real ranks: broadcast to peers, mixed and bucketed, with lost shards up to a budget."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_scale.checkpoint.directory import CheckpointDirectory, read_state
from rdm_scale.config import RunConfig
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents


def train_counting_reads(config: RunConfig) -> tuple[int, Counter[str]]:
    """Train, and return the data-parallel rank and the ranges of shards that this process read."""
    from rdm_scale.parallel import mesh as meshes

    ranges: Counter[str] = Counter()
    read_into, build = Location.read_into, meshes.build_mesh
    built: list[Any] = []
    Location.read_into = lambda s, o, n: (ranges.update([f"{s.name}:{o}"]), read_into(s, o, n))[1]  # type: ignore[method-assign]
    meshes.build_mesh = lambda *given: built.append(build(*given)) or built[-1]  # type: ignore[func-returns-value]
    try:
        train(config)
    finally:
        Location.read_into = read_into  # type: ignore[method-assign]
    return built[0].data_rank, ranges


def test_one_rank_of_a_replica_reads_and_broadcasts_to_its_peers(ranks: RankPool, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "latents")
    held_out = write_latents(tmp_path / "held_out", samples=16, seed=1)
    changes: dict[str, Any] = {"data__validation": held_out, "monitor__validate_every": 2, "train__steps": 4}
    alone = run_config(tmp_path / "alone", data, **changes)
    ranks.run(1, train, alone)
    shared = run_config(tmp_path / "shared", data, parallel__tensor=2, parallel__pipeline=2, **changes)
    reads = ranks.run(8, train_counting_reads, shared)
    readers = [rank for rank, (_, ranges) in enumerate(reads) if ranges]
    assert len(readers) == 2 and {reads[rank][0] for rank in readers} == {0, 1}
    for one, other in zip(metrics(alone.run.dir), metrics(shared.run.dir), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("layout", [{}, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__pipeline": 2}])
def test_several_datasets_and_shapes_train_the_same_in_every_layout(
    ranks: RankPool, tmp_path: Path, layout: dict
) -> None:
    """Two sources of different shapes alternate, and the run is resumed in the middle."""
    square = write_latents(tmp_path / "square", samples=40)
    wide = write_latents(tmp_path / "wide", samples=24, seed=1, size=(1, 4, 16))
    sources = [{"path": square, "weight": 2.0}, {"path": wide, "weight": 1.0}]
    changes: dict[str, Any] = {
        "data__train": sources,
        "data__validation": [square, wide],
        "monitor__validate_every": 3,
        "monitor__validation_samples": 16,
    }
    whole = run_config(tmp_path / "whole", square, **changes, train__steps=9)
    ranks.run(1, train, whole)
    for steps, world in ((4, 2), (9, 8 if layout else 4)):
        parts = run_config(tmp_path / "parts", square, **changes, **layout if steps == 9 else {}, train__steps=steps)
        ranks.run(world, train, parts)
    expected, found = metrics(whole.run.dir), metrics(parts.run.dir)
    assert [r.keys() for r in found] == [r.keys() for r in expected]
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, rel=2e-5)


def lose(data: str, name: str) -> None:
    (Path(data).parent / name).unlink()


def test_lost_shards_are_tolerated_up_to_the_budget(ranks: RankPool, tmp_path: Path) -> None:
    """A lost shard is counted, kept in the checkpoint, and still known to a resume on other ranks."""
    data = write_latents(tmp_path / "latents")
    with_budget = {"data__lost_shards": 1, "checkpoint__every": 2}
    config = run_config(tmp_path / "run", data, **with_budget, train__steps=4)
    lose(data, "shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        ranks.run(2, train, run_config(tmp_path / "strict", data, train__steps=4))
    ranks.run(2, train, config)
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [(line["lost_shards"], line["lost_samples"]) for line in lines] == [(1, 32)] * 4
    folder = CheckpointDirectory(Location(config.run.dir) / "checkpoints")
    (lost,) = read_state(folder.folder(4))["lost_shards"]
    assert lost[1] == "shard-000001.tar"
    ranks.run(4, train, run_config(tmp_path / "run", data, **with_budget, train__steps=6))
    assert [record["step"] for record in metrics(config.run.dir)] == [1, 2, 3, 4, 5, 6]
    lose(data, "shard-000002.tar")
    with pytest.raises(DataError, match=r"2 shards are lost, more than data\.lost_shards=1"):
        ranks.run(2, train, run_config(tmp_path / "run", data, **with_budget, train__steps=8))


def damage_and_train(config: RunConfig, folder: str) -> None:
    """Run on each rank: train, and damage a shard that no rank has read yet after the first step."""
    from rdm_scale.training.trainer import Trainer

    step = Trainer.train_step

    def damaging(self: Any, batches: Any) -> Any:
        if self.step == 1:
            seen = self.mesh.all_gather_object({read.shard for read in self.stream.reads})
            path = Path(folder) / self.stream.datasets[0].manifest.shards[min(set(range(12)) - set().union(*seen))].name
            if self.mesh.is_first:
                path.write_bytes(bytes(path.stat().st_size))
            torch.distributed.barrier()
        return step(self, batches)

    Trainer.train_step = damaging  # type: ignore[method-assign]
    train(config)


def test_a_shard_lost_by_one_rank_is_known_to_all(ranks: RankPool, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "latents", samples=384)
    changes = {"data__lost_shards": 1, "data__workers": 1, "data__prefetch": 1}
    config = run_config(tmp_path / "run", data, **changes, train__steps=46)
    ranks.run(2, damage_and_train, config, str(Path(data).parent))
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    counts = [line["lost_shards"] for line in lines]
    assert counts[0] == 0 and counts[-1] == 1 and counts == sorted(counts)
