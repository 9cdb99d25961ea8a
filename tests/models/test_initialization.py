"""Gate-aware initialization: signal and gradient keep their size through the stack, and values are keyed."""

import pytest
import torch

from rdm_scale.config import GateConfig
from rdm_scale.models import build_model
from rdm_scale.models.gates import ResidualGate, branch_multiplier
from tests.support.stack_gains import small_stack, stack_gains

U = {"stacking": "u"}
LINEAR = {"gate": GateConfig(exponent=1.0)}


@pytest.mark.parametrize(
    ("depth", "changes"), [(12, {}), (48, {}), (192, {}), (12, LINEAR), (192, LINEAR), (12, U), (96, U)], ids=str
)
def test_neural_rdm_keeps_variance_and_cotangent_within_a_factor_of_two(depth: int, changes: dict) -> None:
    variance, cotangent = stack_gains(small_stack(depth, **changes))
    assert 0.5 < variance < 2
    assert 0.5 < cotangent < 2


@pytest.mark.parametrize(("residual", "most"), [("rezero", 1.0), ("adaln_zero", 1.0), ("layerscale", 1.15)])
def test_zero_initialized_gates_preserve_variance_and_cotangent(residual: str, most: float) -> None:
    """Exact where alpha starts at 0. Layerscale starts at 0.1 for 12 blocks: each of 24 branches adds 0.01 Var F."""
    variance, cotangent = stack_gains(small_stack(12, residual=residual))
    assert 1 <= variance <= most
    assert 1 <= cotangent <= most


def test_plain_residuals_amplify_variance_and_cotangent() -> None:
    """Counterexample: the bounds of the other structures can fail."""
    variance, cotangent = stack_gains(small_stack(48, residual="plain"))
    assert variance > 10
    assert cotangent > 4


def test_the_multiplier_is_a_fixed_power_of_the_number_of_branches() -> None:
    assert branch_multiplier(small_stack(50)) == pytest.approx(0.1)
    assert branch_multiplier(small_stack(50, gate=GateConfig(multiplier=3.0, exponent=1.0))) == pytest.approx(0.03)
    assert branch_multiplier(small_stack(40, stacking="u")) == pytest.approx(0.1)  # 80 of blocks, 20 long skips


def test_gates_follow_the_table_of_structures() -> None:
    """z + alpha F + beta with values computed by hand for each structure."""
    z, f, g = torch.full((1, 1, 8), 2.0), torch.full((1, 1, 8), 3.0), torch.full((1, 8), 0.25)

    def output(
        structure: str,
        condition: torch.Tensor | None,
        a: float = 0.0,
        b: float = 0.0,
        base: int | None = None,
        **gate: bool,
    ) -> float:
        changes = {"residual": structure, "hidden_size": 8, "base_depth": base, "gate": GateConfig(**gate)}
        module = ResidualGate(small_stack(50, **changes))
        with torch.no_grad():
            for parameter, value in ((module.a, a), (module.b, b)):
                if parameter is not None:
                    parameter.fill_(value)
        assert module.conditional == (condition is not None)
        alpha, beta = module(condition, torch.zeros(8), torch.float32)
        return (z + (f if alpha is None else alpha * f) + beta).mean().item()

    assert output("plain", None) == 5.0
    assert output("rezero", None, a=0.5) == 3.5
    assert output("layerscale", None, a=0.5) == 3.5
    assert output("adaln_zero", g) == 2.75
    # m = 100 ** -0.5 = 0.1: 2 + (0.1 * 2 + 0.25) * 3 + 0.1 * 4
    assert output("neural_rdm", g, a=2.0, b=4.0) == pytest.approx(3.75)
    assert output("neural_rdm", None, a=2.0, b=4.0, conditional=False) == pytest.approx(3.0)
    # A base of 8 blocks: r = 16 / 100 and m = 16 ** -0.5 = 0.25.
    assert output("plain", None, base=8) == pytest.approx(2 + 0.16 * 3)
    assert output("rezero", None, a=0.5, base=8) == pytest.approx(2 + 0.16 * 0.5 * 3)
    assert output("adaln_zero", g, base=8) == pytest.approx(2 + 0.16 * 0.25 * 3)
    assert output("neural_rdm", g, a=2.0, b=4.0, base=8) == pytest.approx(2 + 0.16 * ((0.25 * 2 + 0.25) * 3 + 0.25 * 4))
    assert ResidualGate(small_stack(50, residual="layerscale", base_depth=8)).start == 0.1  # as at 8 blocks


def test_initial_values_are_keyed_by_name_and_seed() -> None:
    shallow, deep, other = build_model(small_stack(1)), build_model(small_stack(3)), build_model(small_stack(1), seed=1)
    a, b, c = (m.state_dict() for m in (shallow, deep, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    name = "blocks.0.mlp.branch.up.weight"
    assert not torch.equal(a[name], c[name])
    assert not torch.equal(b[name], b[name.replace("0", "1")])
    assert a[name].std().item() == pytest.approx((2 / (64 + 256)) ** 0.5, rel=0.02)
