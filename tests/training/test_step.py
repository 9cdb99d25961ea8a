"""The host's part of a training step: what it reads and how many Python calls it makes."""

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from rdm_scale.batch import TrainingBatch
from rdm_scale.config import ModelConfig, RunConfig, parse_config
from rdm_scale.device import TimeMark
from rdm_scale.diffusion import Objective, build_objective
from rdm_scale.models import DiffusionTransformer, build_model
from tests.support.host_work import CallCounter, HostWork, ReadCounter, ScalarCounter
from tests.support.rank_pool import RankPool

CLIPS = {"input": {"channels": 4, "frames": 4, "height": 4, "width": 4}}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # sections model and diffusion
    "flow": ({}, {}),
    "ddpm": ({}, {"objective": "ddpm"}),
    "ddpm, learned variance": ({"learned_variance": True}, {"objective": "ddpm"}),
    "no condition": ({"condition": "none"}, {}),
    "text": ({"condition": "text", "text": {"width": 6, "pooled_width": 5}}, {}),
    "u stack": ({"stacking": "u"}, {}),
    "factorized": ({"attention": "factorized"} | CLIPS, {}),
    "rotary and qk_norm": ({"positions": "rotary", "qk_norm": True}, {}),
}


def config_of(model: dict[str, Any], diffusion: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
    small = {"input": {"channels": 4, "height": 4, "width": 4}, "hidden_size": 16, "num_heads": 2, "depth": 2}
    tree = {
        "model": small | {"num_classes": 4} | model,
        "diffusion": diffusion or {},
        "train": {"global_batch_size": 2},
    }
    return parse_config(tree | {"data": {"train": "none"}, "run": {"dir": "none"}} | sections, "the test")


def batch_of(config: RunConfig, device: str = "cpu", size: tuple[int, ...] | None = None) -> TrainingBatch:
    model, numbers = config.model, torch.arange(2)
    shape = (2, model.input.channels, *(size or (model.input.frames, model.input.height, model.input.width)))
    tensors = {"positions": numbers, "ids": numbers, "latents": torch.ones(shape), "noise": 2 * torch.ones(shape)}
    tensors["t"] = torch.tensor([1.0, 2.0]) if config.diffusion.objective == "ddpm" else torch.tensor([0.25, 0.5])
    if model.condition == "text":
        width, pooled = model.text.width, model.text.pooled_width
        captions = {"tokens": torch.ones(2, 3, width), "mask": torch.ones(2, 3, dtype=torch.bool)}
        tensors |= {f"condition.{name}": value for name, value in captions.items()}
        tensors["condition.pooled"] = torch.ones(2, pooled)
    elif model.condition == "class":
        tensors["condition"] = numbers
    return TrainingBatch.from_tensors(0, tensors).to(device)


def on_meta(config: ModelConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(config)


@pytest.mark.parametrize("size", [None, (8, 4)], ids=["configured size", "another size"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_loss_and_backward_do_no_host_work(family: str, size: tuple[int, int] | None) -> None:
    """A model and a batch on the meta device need nothing of the CPU: no table is built there, no value is read."""
    config = config_of(*FAMILIES[family])
    model, objective = on_meta(config.model), build_objective(config.diffusion, config.model.learned_variance)
    batch = batch_of(config, "meta", None if size is None else (config.model.input.frames, *size))

    def step() -> None:
        losses_of(model, objective, batch).mean().backward()

    step()  # tables of a size are made when it first comes
    with HostWork() as work:
        step()
    assert not work.found


def losses_of(model: torch.nn.Module, objective: Objective, batch: TrainingBatch) -> torch.Tensor:
    return objective.sample_losses(model(*objective.model_inputs(batch)), batch)


class StepWork(NamedTuple):
    """Work of the host in one training step."""

    reads: Counter[str]
    scalars: int  # read in C++ too
    tensors: int  # made of host data
    reads_of_the_result: Counter[str]
    calls: Counter[str]


def work_of_a_step(config: RunConfig) -> StepWork:
    """Run on one rank: train four steps, and count in the last two."""
    from rdm_scale.parallel.mesh import build_mesh
    from rdm_scale.parallel.parallelize import parallelize
    from rdm_scale.parallel.plan import plan_parallelism
    from rdm_scale.training.optimizer import build_optimizer
    from rdm_scale.training.rank_status import RankStatus
    from rdm_scale.training.step import StepUnderWay, training_step

    mesh = build_mesh(config.parallel)
    plan = plan_parallelism(config, mesh.world_size, None)
    model = parallelize(config, mesh, plan, partial(build_optimizer, config.optimizer, config.model))
    objective = build_objective(config.diffusion, config.model.learned_variance)
    status = RankStatus(mesh, SimpleNamespace(busy=False), None)  # type: ignore[arg-type]
    batch = batch_of(config)

    def step(number: int) -> StepUnderWay:
        return training_step(config, model, objective, batch, number, status, TimeMark(mesh.device))

    for number in (1, 2):
        step(number).read(mesh, config)
    with ReadCounter() as python, ScalarCounter() as scalars:
        under_way = step(3)
    with ReadCounter() as of_the_result:
        assert under_way.read(mesh, config).loss > 0
    with CallCounter(without=DiffusionTransformer.run_blocks) as calls:
        step(4)
    mesh.shutdown()
    return StepWork(python.reads, scalars.reads, python.tensors, of_the_result.reads, calls.calls)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kept_step_reads_nothing_and_its_calls_do_not_grow_with_depth(ranks: RankPool, precision: str) -> None:
    """Of host data it makes one tensor, with the flags that ranks exchange; its result is one read of one tensor. The
    calls are those of the whole step but for the blocks' own.
    """

    def work(depth: int) -> StepWork:
        train = {"global_batch_size": 2, "precision": precision}
        config = config_of({"depth": depth}, train=train, parallel={"keep_gathered": "always"})
        (found,) = ranks.run(1, work_of_a_step, config)
        return found

    few, many = work(4), work(12)
    for found in (few, many):
        assert (dict(found.reads), found.scalars, found.tensors) == ({}, 0, 1)
        assert dict(found.reads_of_the_result) == {"tolist": 1}
    grown = {name: many.calls[name] - count for name, count in few.calls.items() if many.calls[name] > count}
    assert many.calls.total() == few.calls.total(), grown
