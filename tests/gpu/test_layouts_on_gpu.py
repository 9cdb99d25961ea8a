"""Layouts under NCCL train what plain PyTorch trains on one CPU. The ranks share one GPU (rank_pool says how)."""

import os
from pathlib import Path

import pytest

from rdm_scale.config import RunConfig
from rdm_scale.training.depth_profiles import read_profiles
from tests.support.layouts import MODEL, Case
from tests.support.rank_pool import RankPool, free_port
from tests.support.reference import Reference, deviation, plain_training
from tests.support.small_runs import add_captions, metrics, run_config, train, write_latents

pytestmark = pytest.mark.gpu
SMALL = MODEL | {"model__depth": 4, "train__steps": 5}
CASES = {
    1: [
        Case(1, 1, 1, "0", "1f1b", "none", False),
        Case(1, 1, 1, "1", "1f1b", "selective", False),
        Case(1, 1, 1, "2", "1f1b", "full", False),
        Case(1, 1, 1, "3 kept", "1f1b", "every_2", False),
        Case(1, 1, 1, "3 by block", "1f1b", "selective", False),
    ],
    4: [
        Case(1, 1, 4, "1", "1f1b", "none", False),
        Case(1, 1, 4, "2", "1f1b", "selective", False),
        Case(1, 1, 4, "3 kept", "1f1b", "none", False),
        Case(1, 1, 4, "3 by block", "1f1b", "full", False),
        Case(4, 1, 1, "3 kept", "1f1b", "none", True),
        Case(2, 1, 2, "3 by block", "1f1b", "selective", False),
        Case(1, 2, 2, "3 kept", "v_1f1b", "none", False),
        Case(2, 2, 1, "1", "interleaved_1f1b", "none", True),
        Case(1, 4, 1, "0", "1f1b", "every_2", False),
        Case(2, 2, 1, "3 by block", "v_1f1b", "selective", True),
    ],
}
CLIPS = {"model__input": {"channels": 4, "frames": 4, "height": 8, "width": 8}, "model__patch_size": [1, 4, 4]}
FAMILY = {
    "u, text": {"model__condition": "text", "model__text": {"width": 6, "pooled_width": 5}, "model__depth": 5}
    | {"model__stacking": "u", "model__qk_norm": True},
    "clips, factorized": {"model__attention": "factorized", "model__depth": 4, "model__qk_norm": True} | CLIPS,
    "clips, rotary": {"model__positions": "rotary", "model__qk_norm": True, "model__num_heads": 4} | CLIPS,
    "base of another size": {"model__base_depth": 2, "model__base_width": 8},
}


def train_each(configs: list[RunConfig], ports: list[int]) -> None:
    """Run on each rank: several trainings in sequence, because processes that import all take long to start."""
    for config, port in zip(configs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train(config)


def run(world: int, configs: list[RunConfig]) -> None:
    RankPool(gpu=True).run(world, train_each, configs, [free_port() for _ in configs])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def reference(data: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return plain_training(run_config(tmp_path_factory.mktemp("reference"), data, **SMALL))


@pytest.mark.parametrize("world", CASES)
def test_layouts(world: int, reference: Reference, data: str, tmp_path: Path) -> None:
    cases = CASES[world]
    configs = [run_config(tmp_path / str(i), data, **(case.changes() | SMALL)) for i, case in enumerate(cases)]
    run(world, configs)
    found = {str(case): deviation(config, reference) for case, config in zip(cases, configs, strict=True)}
    for case, worst in found.items():
        print(f"{case}: {worst}")
    for worst in found.values():
        worst.check()


def test_family(tmp_path: Path) -> None:
    configs = []
    for name, changes in FAMILY.items():
        size = (4, 8, 8) if "clips" in name else (1, 8, 8)
        data = write_latents(tmp_path / name, size=size)
        if "text" in name:
            add_captions(data)
        configs.append(run_config(tmp_path / name / "run", data, **(SMALL | changes)))
    run(1, configs)
    found = {name: deviation(c, plain_training(c)) for name, c in zip(FAMILY, configs, strict=True)}
    print(found)
    for worst in found.values():
        worst.check()


def test_bf16_stays_near(reference: Reference, data: str, tmp_path: Path) -> None:
    """Steps in bf16 differ by its rounding, 2^-9, of a loss that is a mean of many terms."""
    cases = [Case(1, 1, 1, zero, "1f1b", "none", False) for zero in ("1", "3 kept", "3 by block")]
    changes = [case.changes() | SMALL | {"train__precision": "bf16"} for case in cases]
    configs = [run_config(tmp_path / str(i), data, **c) for i, c in enumerate(changes)]
    run(1, configs)
    for config in configs:
        losses = [record["loss"] for record in metrics(config.run.dir)]
        assert losses == pytest.approx(reference.losses, rel=2**-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_repeats_bit_for_bit(data: str, tmp_path: Path, precision: str) -> None:
    """Also looked at on the way: validated, drawn from, watched along depth."""
    same = SMALL | {"train__deterministic": True, "train__precision": precision, "train__global_batch_size": 8}
    held_out = write_latents(tmp_path / "validation", samples=7)
    looks = {"data__validation": held_out, "monitor__validate_every": 2, "monitor__depth_every": 2}
    whole = run_config(tmp_path / "whole", data, **(same | {"train__steps": 6}))
    parts = [run_config(tmp_path / "parts", data, **(same | looks | {"train__steps": n})) for n in (3, 6)]
    run(1, [whole, *parts])
    found = metrics(parts[0].run.dir)
    assert [record["step"] for record in found if record.pop("validation_loss", None)] == [2, 4, 6]
    assert found == metrics(whole.run.dir)


def test_an_offloaded_update_is_watched_along_depth(reference: Reference, data: str, tmp_path: Path) -> None:
    """The gradients that the probe squares are on the host, their divisor is on the GPU."""
    changes = Case(1, 1, 1, "3 kept", "1f1b", "none", False, offload="optimizer").changes()
    watched = {"monitor__depth_every": 2, "train__deterministic": True}  # at a fixed interval
    config = run_config(tmp_path, data, **(changes | SMALL | watched))
    run(1, [config])
    deviation(config, reference).check()
    assert read_profiles(Path(config.run.dir) / "depth.jsonl")[0] == [1, 2, 4]
