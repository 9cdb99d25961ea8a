"""Every layout trains the same model: tensor x pipeline x ZeRO on up to 8 ranks, compared with plain PyTorch."""

from pathlib import Path

import pytest

from tests.support.layouts import MODEL, Case, apart, covering, full
from tests.support.rank_pool import RankPool
from tests.support.reference import Deviation, Reference, deviation, plain_training
from tests.support.small_runs import metrics, run_config, train, write_latents

COVERING = covering()
APART = apart()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def reference(data: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    reference = plain_training(run_config(tmp_path_factory.mktemp("reference"), data, **MODEL))
    assert max(reference.norms) > 1.5 > min(reference.norms), "gradients must be clipped in some steps, but not in all"
    return reference


def run(case: Case, ranks: RankPool, reference: Reference, data: str, folder: Path) -> Deviation:
    config = run_config(folder, data, **case.changes())
    ranks.run(case.world, train, config)
    return deviation(config, reference)


@pytest.mark.parametrize("case", COVERING + APART, ids=str)
def test_layout(case: Case, ranks: RankPool, reference: Reference, data: str, tmp_path: Path) -> None:
    """The weights are read from the checkpoint, which also proves that the layout wrote the entire model."""
    run(case, ranks, reference, data, tmp_path).check()


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_full_matrix(ranks: RankPool, reference: Reference, data: str, tmp_path: Path) -> None:
    """Also writes docs/parity.md."""
    found = {case: run(case, ranks, reference, data, tmp_path / str(i)) for i, case in enumerate(full())}
    table = Path(__file__).parents[2] / "docs" / "parity.md"
    table.write_text(report(found))
    for worst in found.values():
        worst.check()


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_layouts_in_bf16(ranks: RankPool, reference: Reference, data: str, tmp_path: Path) -> None:
    """Metrics agree within bf16 rounding: a product rounds to 2^-9, and the mean of many differs by far less."""
    for number, case in enumerate(COVERING):
        residual = ("fp32", "bf16")[number % 2]
        changes = case.changes() | {"train__precision": "bf16", "train__residual_dtype": residual}
        config = run_config(tmp_path / str(number), data, **changes)
        ranks.run(case.world, train, config)
        for record, loss, norm in zip(metrics(config.run.dir), reference.losses, reference.norms, strict=True):
            assert record["loss"] == pytest.approx(loss, rel=2e-3), (case, residual)
            assert record["grad_norm"] == pytest.approx(norm, rel=2e-2), (case, residual)


def report(found: dict[Case, Deviation]) -> str:
    lines = [
        "# Parity of layouts",
        "",
        "Written by `pytest tests/distributed/test_layouts.py -k full_matrix` (part of `make test-full`): each layout",
        "trains 10 steps in fp32 with clipping, weight decay and EMA, and is compared with a plain PyTorch AdamW loop",
        "on one process that shares no training code. Largest relative deviation of any step (loss, gradient norm;",
        "bound 1e-5) and of any tensor from its norm at the end (weights, EMA weights; bound 1e-4).",
        "",
        "| tensor | pipeline | data | ZeRO | sequence | schedule | recompute | loss | norm | weights | EMA weights |",
        "|" + "---|" * 11,
    ]
    for case, worst in sorted(found.items()):
        cells = [case.tensor, case.pipeline, case.data, case.zero, "yes" if case.sequence else "", case.schedule]
        figures = [f"{value:.1e}" for value in worst]
        lines.append("| " + " | ".join([*map(str, cells), case.recompute, *figures]) + " |")
    return "\n".join(lines) + "\n"


def test_a_resume_on_the_same_layout_is_bit_identical(ranks: RankPool, data: str, tmp_path: Path) -> None:
    case = Case(2, 2, 2, "3 kept", "v_1f1b", "none", True)
    whole = run_config(tmp_path / "whole", data, **(case.changes() | {"train__steps": 6}))
    ranks.run(case.world, train, whole)
    for steps in (3, 6):
        parts = run_config(tmp_path / "parts", data, **(case.changes() | {"train__steps": steps}))
        ranks.run(case.world, train, parts)
    assert metrics(parts.run.dir) == metrics(whole.run.dir)


def test_validation_loss_is_the_same_on_every_layout(ranks: RankPool, data: str, tmp_path: Path) -> None:
    """The validation loss is the same on every layout."""
    held_out = write_latents(tmp_path / "held_out", samples=17, seed=1)
    changes = {"data__validation": held_out, "monitor__validate_every": 2, "train__steps": 4}
    losses = {}
    for case in (Case(1, 1, 1, "0", "1f1b", "none", False), Case(2, 2, 2, "3 kept", "v_1f1b", "none", True)):
        config = run_config(tmp_path / case.zero, data, **(case.changes() | changes))
        ranks.run(case.world, train, config)
        losses[case] = [r["validation_loss"] for r in metrics(config.run.dir) if "validation_loss" in r]
    one, other = losses.values()
    assert len(one) == 2 and other == pytest.approx(one, rel=1e-5)
