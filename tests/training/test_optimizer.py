"""Learning rate against its closed form, weight decay and rates of parameter groups."""

import importlib
import sys
from pathlib import Path

import pytest

from rdm_scale.config import InputConfig, ModelConfig, OptimizerConfig
from rdm_scale.models import build_model
from rdm_scale.training.optimizer import apex_adam, build_optimizer, learning_rate


def test_warm_up_is_linear_from_the_first_step() -> None:
    config = OptimizerConfig(lr=0.8, warmup_steps=4)
    assert [learning_rate(config, step) for step in (1, 2, 3, 4, 5, 1000)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    # Half-way from step 10 to 110: the mean of both ends. A quarter of the way: 1/4 and (1 - cos(45 degrees)) / 2.
    [("linear", {35: 0.775, 60: 0.55, 110: 0.1, 500: 0.1}), ("cosine", {35: 0.868198, 60: 0.55, 110: 0.1, 500: 0.1})],
)
def test_schedules_end_at_their_own_length(schedule: str, expected: dict[int, float]) -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule=schedule, schedule_steps=110, final_lr_ratio=0.1)
    assert {step: learning_rate(config, step) for step in expected} == pytest.approx(expected, rel=1e-5)


def test_only_weight_matrices_decay() -> None:
    config = ModelConfig(input=InputConfig(height=8, width=8), hidden_size=32, num_heads=4, depth=2)
    model = build_model(config)
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), config, model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert len(named) == len(decay) == len(list(model.parameters()))
    assert named["blocks.0.attention.branch.qkv.weight"] == named["patch_embed.weight"] == 0.1
    free = {name for name, value in named.items() if value == 0}
    assert free == {n for n in named if n.endswith((".bias", ".gate.a", ".gate.b")) or n == "class_embed.weight"}


def test_groups_have_the_rates_of_a_model_with_a_base() -> None:
    """CompleteP: lr 0.1, decay 0.2 and eps 1e-3 were tuned at a quarter of the width and an eighth of the depth."""
    size = {"hidden_size": 128, "num_heads": 16, "depth": 16, "base_width": 32, "base_depth": 2}
    config = ModelConfig(input=InputConfig(height=8, width=8), **size)
    model = build_model(config)
    optimizer = build_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.2, eps=1e-3), config, model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = {name: groups[id(p)] for name, p in model.named_parameters()}
    for name, lr, decay, eps in (
        ("blocks.9.attention.branch.qkv.weight", 0.025, 0.8, 1e-3 / 32),
        ("blocks.9.attention.gate.a", 0.1, 0.0, 1e-3 / 32),
        ("patch_embed.weight", 0.1, 0.2, 1e-3 / 4),
        ("class_embed.weight", 0.1, 0.0, 1e-3 / 4),
        ("head.out.weight", 0.025, 0.8, 1e-3),
    ):
        group = named[name]
        assert (group["lr"], group["weight_decay"], group["eps"]) == pytest.approx((lr, decay, eps)), name
        assert group["lr_scale"] == pytest.approx(lr / 0.1)


def test_fused_adam_is_found_only_in_nvidia_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a package, with PyPI's `apex`, which has no optimizers, and with NVIDIA's."""
    monkeypatch.syspath_prepend(tmp_path)
    assert apex_adam() is None
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    importlib.invalidate_caches()
    try:
        assert apex_adam() is None
        (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam: pass\n")
        importlib.invalidate_caches()
        assert apex_adam().__name__ == "FusedAdam"
    finally:
        for name in ("apex", "apex.optimizers"):
            sys.modules.pop(name, None)
