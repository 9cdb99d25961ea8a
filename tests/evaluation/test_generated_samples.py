"""Samples kept in files: a full disk, a damaged file, and plans that differ."""

import dataclasses
import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from rdm_scale.checkpoint import load_trained
from rdm_scale.errors import DataError
from rdm_scale.evaluation.generated_samples import (
    GeneratedSamples,
    GenerationPlan,
    conditions_in_turns,
    digest_of_names,
    pixel_size,
)
from rdm_scale.evaluation.networks import load_network
from rdm_scale.evaluation.sample_sets import kept_rows
from rdm_scale.evaluation.set_statistics import SetIdentity, Wanted
from rdm_scale.storage.local_files import LocalFiles
from rdm_scale.storage.location import Location
from tests.support.saved_models import run_config, save_model


@pytest.fixture
def plan(tmp_path: Path) -> GenerationPlan:
    """Ten samples of a model as initialized, in files of four."""
    save_model(Location(tmp_path / "run"), 0, run_config())
    size = pixel_size(load_trained(str(tmp_path / "run")))
    identity = SetIdentity.of(load_network("digits", 1), size)
    own = {
        "step": 0,
        "weights": "ema",
        "config": "c",
        "parameters": "p",
        "condition": "5 classes in turns",
        "names": "n",
        "sampler": "euler",
        "steps": 2,
    }
    return GenerationPlan(
        model=str(tmp_path / "run"), samples=10, guidance=1.0, seed=0, identity=identity, chunk=4, pixels=True, **own
    )


def draw(plan: GenerationPlan, folder: Path) -> GeneratedSamples:
    trained = load_trained(plan.model)
    config = trained.config.model_copy(
        update={"sampling": trained.config.sampling.model_copy(update={"steps": plan.steps})}
    )
    samples = GeneratedSamples(plan, Location(folder))
    request, words = conditions_in_turns(trained, plan.samples)
    assert words == plan.condition
    samples.draw(trained, config, request, load_network("digits", 1))
    return samples


def test_a_full_disk_ends_in_one_line_and_the_rest_is_drawn_later(
    plan: GenerationPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalFiles.write

    def full_after_one(self: LocalFiles, path: str, content: bytes) -> None:
        if "chunk-000001" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path, content)

    with monkeypatch.context() as patched:
        patched.setattr(LocalFiles, "write", full_after_one)
        with pytest.raises(DataError, match=r"No space left on device; make room.*the same command goes on with the"):
            draw(plan, tmp_path / "out")
    assert GeneratedSamples(plan, Location(tmp_path / "out")).missing() == [1, 2]
    found = np.concatenate(list(draw(plan, tmp_path / "out").pixels()))
    at_once = np.concatenate(list(draw(dataclasses.replace(plan, chunk=10), tmp_path / "out").pixels()))
    assert found.shape == (10, 1, 8, 8, 3) and np.array_equal(found, at_once)


def test_statistics_are_those_of_the_samples(plan: GenerationPlan, tmp_path: Path) -> None:
    samples = draw(plan, tmp_path / "out")
    network = load_network("digits", 1)
    found = samples.statistics(Wanted(features=7, probabilities=True), network, "digits")
    pixels = torch.from_numpy(np.concatenate(list(samples.pixels())))
    features = network.extract(pixels)
    assert found.samples == 10 and found.features is not None and found.probabilities is not None
    np.testing.assert_allclose(found.features, features.pooled[kept_rows(torch.arange(10), 7)], rtol=1e-4, atol=1e-4)
    assert features.logits is not None
    np.testing.assert_allclose(found.probabilities, features.logits.softmax(1), rtol=1e-3, atol=1e-6)


def test_a_damaged_file_is_named(plan: GenerationPlan, tmp_path: Path) -> None:
    samples = draw(plan, tmp_path / "out")
    file = tmp_path / "out" / plan.key / "chunk-000001.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"chunk-000001.npz is damaged: .*; remove it and run the same command again"):
        samples.statistics(Wanted(), load_network("digits", 1), "digits")


def test_another_plan_has_another_folder(plan: GenerationPlan) -> None:
    changes = {
        "parameters": "",
        "names": "",
        "step": 1,
        "weights": "raw",
        "samples": 11,
        "sampler": "heun",
        "steps": 3,
        "guidance": 2.0,
        "seed": 1,
    }
    keys = {dataclasses.replace(plan, **{name: value}).key for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(keys | {plan.key}) == len(changes) + 1
    assert len({digest_of_names(names) for names in (["a b"], ["a", "b"], ["b", "a"])}) == 3
