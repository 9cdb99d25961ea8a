"""Depth profiles of every layout, compared with plain autograd on the entire model and the global batch."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from rdm_scale.config import RunConfig
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import build_objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.models import build_model
from rdm_scale.training.depth_profiles import Profile, read_profiles
from tests.support.layouts import Case
from tests.support.rank_pool import RankPool
from tests.support.reference import plain_training
from tests.support.small_runs import metrics, run_config, train, write_latents

STEP = 3  # in the first step the head is still zero, and so are all sensitivities
CHANGES = {"train__steps": STEP, "monitor__depth_every": STEP}
CASES = [
    Case(1, 1, 1, "0", "1f1b", "none", False),
    Case(1, 1, 3, "3 by block", "1f1b", "selective", False),
    Case(2, 2, 2, "3 kept", "v_1f1b", "full", True),
    Case(4, 1, 2, "2", "1f1b", "every_2", False),
    Case(2, 2, 1, "1", "interleaved_1f1b", "none", False),
]
U = {"model__stacking": "u", "model__depth": 5, "model__base_depth": 3}
U_CASES = [
    Case(2, 2, 2, "3 kept", "v_1f1b", "none", True),
    Case(1, 2, 1, "1", "v_1f1b", "full", False),
    Case(2, 1, 2, "3 by block", "1f1b", "none", False),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def expected(data: str, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return plain_profile(run_config(tmp_path_factory.mktemp("reference"), data, **(CASES[0].changes() | CHANGES)))


def plain_profile(config: RunConfig) -> Profile:
    """Profile of step `STEP`, computed by autograd on one process."""
    before = config.model_copy(update={"train": config.train.model_copy(update={"steps": STEP - 1})})
    model = build_model(config.model)
    model.load_state_dict(plain_training(before).weights, strict=False)
    stream = LatentStream(config.data.train, global_batch_size=config.train.global_batch_size, seed=config.train.seed)
    batch = draw(
        next(itertools.islice(stream, STEP - 1, None)),
        objective=build_objective(config.diffusion, False),
        seed=config.train.seed,
        num_classes=config.model.num_classes,
        condition_dropout=config.diffusion.condition_dropout,
    )
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    names = ("skip", "attention", "mlp")
    blocks = list(model.blocks.values())
    modules = [module for block in blocks for module in (block, *(getattr(block, name) for name in names)) if module]
    for module in modules:
        module.register_forward_hook(lambda m, inputs, z: z.retain_grad() or seen.__setitem__(m, (inputs[0], z)))
    gates: dict[nn.Module, Tensor] = {}
    for module in modules:
        if hasattr(module, "gate"):
            module.gate.register_forward_hook(lambda gate, _, outputs: gates.__setitem__(gate, outputs[0]))
    t = batch.t.view(-1, 1, 1, 1, 1)
    prediction = model((1 - t) * batch.latents + t * batch.noise, 1000 * batch.t, batch.condition)
    ((prediction - (batch.noise - batch.latents)) ** 2).mean().backward()

    found: Profile = {}
    found["stream"] = [seen[b][1].square().mean().sqrt().item() for b in blocks]
    found["sensitivity"] = [seen[b][1].grad.norm().item() for b in blocks]
    found["gradient"] = [math.sqrt(sum(p.grad.square().sum().item() for p in b.parameters())) for b in blocks]
    for name in (name for name in names if any(getattr(b, name) for b in blocks)):
        values = [_of_branch(branch, seen, gates) if (branch := getattr(b, name)) else [None] * 4 for b in blocks]
        kinds = ("gain", "alpha", "alpha_std", "beta")
        found |= {f"{name}.{kind}": list(row) for kind, row in zip(kinds, zip(*values, strict=True), strict=True)}
    return found


def _of_branch(
    branch: Any, seen: dict[nn.Module, tuple[Tensor, Tensor]], gates: dict[nn.Module, Tensor]
) -> list[float]:
    (x, z), alpha = seen[branch], gates[branch.gate]
    gain, beta = (z - x).norm() / x.norm(), branch.gate.multiplier * branch.gate.b.square().mean().sqrt()
    return [gain.item(), alpha.mean().item(), alpha.std(unbiased=False).item(), beta.item()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_profile_of_a_layout(case: Case, expected: Profile, ranks: RankPool, data: str, tmp_path: Path) -> None:
    check(run_config(tmp_path, data, **(case.changes() | CHANGES)), case, expected, ranks)


def test_profile_of_a_u_stack(ranks: RankPool, data: str, tmp_path: Path) -> None:
    """Long skips have gains and gates of their own, in the blocks that consume them."""
    changes = CHANGES | U
    expected = plain_profile(run_config(tmp_path / "plain", data, **(U_CASES[0].changes() | changes)))
    assert [value is None for value in expected["skip.gain"]] == [True, True, True, False, False]
    for i, case in enumerate(U_CASES):
        check(run_config(tmp_path / str(i), data, **(case.changes() | changes)), case, expected, ranks)


def check(config: RunConfig, case: Case, expected: Profile, ranks: RankPool) -> None:
    ranks.run(case.world, train, config)
    steps, (first, profile) = read_profiles(Path(config.run.dir) / "depth.jsonl")
    assert steps == [1, STEP]
    assert set(profile) == set(expected) == set(first)
    for name, values in expected.items():
        for one, other in zip(profile[name], values, strict=True):
            assert one == (None if other is None else pytest.approx(other, rel=2e-4, abs=1e-7)), name
    assert max(first["sensitivity"]) == 0 < min(profile["sensitivity"])


def test_profiles_do_not_change_training_and_are_truncated_on_resume(
    ranks: RankPool, data: str, tmp_path: Path
) -> None:
    changes = {"train__steps": 6, "checkpoint__every": 4}
    whole = run_config(tmp_path / "whole", data, **changes, monitor__depth_every=2)
    ranks.run(2, train, whole)
    without = run_config(tmp_path / "without", data, **changes, monitor__depth_every=0)
    ranks.run(2, train, without)
    assert metrics(without.run.dir) == metrics(whole.run.dir)
    assert not (Path(without.run.dir) / "depth.jsonl").exists()
    path = Path(whole.run.dir) / "depth.jsonl"
    profiles = path.read_text()
    assert read_profiles(path)[0] == [1, 2, 4, 6]
    commit = Path(whole.run.dir) / "checkpoints/step_00000006/commit.json"
    commit.unlink()
    ranks.run(2, train, whole)
    assert path.read_text() == profiles
