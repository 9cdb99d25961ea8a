"""Summaries of checkpoints."""

import pytest

from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.checkpoint.summary import gates, summarize
from rdm_scale.models import build_model
from rdm_scale.storage.location import Location
from tests.support.saved_models import checkpoint_of, run_config


def test_summary_contains_norms_and_gates(run: Location) -> None:
    state, count, summaries = summarize(Location(checkpoint_of(run, 2)))
    model = build_model(run_config().model, seed=2)
    assert (state["layout"]["data"], count) == (3, len(list(model.parameters())))
    for summary in summaries:
        parameter = model.get_parameter(summary.name)
        assert summary.shape == tuple(parameter.shape)
        assert summary.norms["ema"] == pytest.approx((parameter + 2).norm().item(), rel=1e-5)
        assert summary.norms["weights"] == pytest.approx((parameter + 3).norm().item(), rel=1e-5)
    found = {gate.name: gate for gate in gates(open_model(checkpoint_of(run, 2)))}
    assert len(found) == 8  # a and b, of two branches of two blocks
    # a is 1 + 2, and m = 4^-1/2
    assert found["blocks.1.mlp.gate.a"].mean == 1.5 and found["blocks.1.mlp.gate.b"].largest == 1.0
