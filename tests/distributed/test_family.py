"""Members of the model family on layouts that are special for their parts, compared with plain PyTorch."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rdm_scale.checkpoint import load_model
from tests.support.layouts import MODEL, Case
from tests.support.rank_pool import RankPool
from tests.support.reference import deviation, plain_training
from tests.support.small_runs import add_captions, metrics, run_config, train, write_latents


class Member(NamedTuple):
    """A model, the alternating shapes [T, H, W] of its latents, and the layouts to test it on."""

    model: dict[str, Any]
    sizes: list[tuple[int, int, int]]
    cases: list[Case]
    captions: bool = False


CLIPS = {"model__input": {"channels": 4, "frames": 4, "height": 8, "width": 8}, "model__patch_size": [1, 4, 4]}
FAMILY = {
    "u": Member(
        {"model__stacking": "u", "model__depth": 7},
        [(1, 8, 8)],
        [
            Case(2, 2, 2, "3 kept", "v_1f1b", "none", True),
            Case(2, 2, 2, "3 by block", "v_1f1b", "full", False),
            Case(1, 3, 1, "1", "v_1f1b", "selective", False),
            Case(4, 1, 1, "2", "1f1b", "every_2", True),
        ],
    ),
    "base of another size": Member(
        {"model__base_depth": 2, "model__base_width": 8, "model__depth": 5},
        [(1, 8, 8)],
        [
            Case(2, 2, 2, "3 kept", "v_1f1b", "none", True),
            Case(1, 5, 1, "1", "1f1b", "none", False),  # stages have fewer parameter groups than the model
            Case(4, 1, 2, "2", "1f1b", "full", False),
            Case(2, 1, 2, "3 by block", "1f1b", "selective", False),
        ],
    ),
    "plain, base of another depth": Member(  # alpha is a constant, and must still reach every token's rank
        {"model__residual": "plain", "model__base_depth": 2, "model__depth": 5},
        [(1, 8, 8)],
        [Case(2, 2, 2, "3 kept", "1f1b", "selective", True)],
    ),
    "text": Member(
        {"model__condition": "text", "model__text": {"width": 6, "pooled_width": 5}, "model__depth": 5}
        | {"model__stacking": "u", "model__qk_norm": True},
        [(1, 8, 8)],
        [
            Case(2, 2, 2, "3 kept", "v_1f1b", "none", True),
            Case(2, 1, 2, "3 by block", "1f1b", "full", False),
            Case(1, 2, 1, "2", "v_1f1b", "selective", False),
        ],
        captions=True,
    ),
    "rotary": Member(
        {"model__positions": "rotary", "model__qk_norm": True, "model__num_heads": 4, "model__depth": 3} | CLIPS,
        [(4, 8, 8)],
        [Case(2, 2, 1, "3 kept", "1f1b", "selective", False)],
    ),
    "images among clips": Member(
        {"model__depth": 4, "model__stacking": "u", "model__attention": "factorized"} | CLIPS,
        [(4, 8, 8), (1, 8, 8)],
        [Case(1, 2, 2, "3 by block", "v_1f1b", "none", False), Case(2, 1, 1, "1", "1f1b", "selective", True)],
    ),
    "factorized": Member(
        {"model__attention": "factorized", "model__depth": 4, "model__qk_norm": True} | CLIPS,
        [(4, 8, 8)],
        [
            Case(2, 4, 1, "1", "1f1b", "none", True)
        ],  # the second block, which adds the temporal positions, is on a later stage
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_layout_trains_the_same_model(name: str, ranks: RankPool, tmp_path: Path) -> None:
    member = FAMILY[name]
    sets = [write_latents(tmp_path / f"data_{size[0]}", size=size) for size in member.sizes]
    if member.captions:
        for one in sets:
            add_captions(one)
    data = [{"path": one} for one in sets]
    few = member.model | {"train__steps": 5}
    reference = plain_training(run_config(tmp_path / "reference", data, **(MODEL | few)))
    for i, case in enumerate(member.cases):
        config = run_config(tmp_path / str(i), data, **(case.changes() | few))
        ranks.run(case.world, train, config)
        found = deviation(config, reference)
        print(f"{name}, {case}: {found}")
        found.check()


def test_learned_variance_is_trained_under_ddpm(ranks: RankPool, tmp_path: Path) -> None:
    """The head's rows for the variance are trained, and losses are the same with a pipeline."""
    data = write_latents(tmp_path / "data")
    changes = {"model__learned_variance": True, "diffusion__objective": "ddpm", "train__steps": 3}
    runs = []
    for case in (Case(1, 1, 1, "0", "1f1b", "none", False), Case(1, 2, 1, "1", "1f1b", "none", False)):
        config = run_config(tmp_path / case.zero, data, **(case.changes() | changes))
        ranks.run(case.world, train, config)
        runs.append([record["loss"] for record in metrics(config.run.dir)])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    head = load_model(config.run.dir, "weights").head.out.weight.unflatten(0, (4, 8))  # [pixel, channel, D]
    noise, variance = head.abs().amax((0, 2)).chunk(2)
    assert noise.min() > 0 and variance.min() > 0
