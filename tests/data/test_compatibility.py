"""Data that does not fit the model is refused before anything is built."""

from pathlib import Path
from typing import Any

import pytest

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import RunConfig
from rdm_scale.data.compatibility import DataFacts, check_data
from rdm_scale.errors import DataError
from tests.support.latent_sets import LatentSet, WriteSet, write_buckets
from tests.support.small_runs import run_config, write_latents

TEXT = {"model__condition": "text", "model__text": {"width": 6, "pooled_width": 5}}


def config_for(train: LatentSet, validation: LatentSet | None = None, **model: Any) -> RunConfig:
    shape = {"input": {"channels": 2, "height": 3, "width": 3}, "patch_size": (1, 1, 1), "num_classes": 3}
    data = {"train": train.url, "validation": validation.url if validation else None}
    return RunConfig.model_validate({"model": shape | model, "data": data, "run": {"dir": "x"}})


def test_fitting_data_is_known_by_the_digest_of_its_manifest(write_set: WriteSet) -> None:
    data, held_out = write_set(9), write_set(5)
    facts = check_data(config_for(data, held_out))
    assert facts.identity == {"train": data.manifest.digest}
    assert facts.codec == data.manifest.codec and facts.class_names == ("zero", "one", "two")
    assert write_set(8).manifest.digest != data.manifest.digest


def test_validation_shards_that_are_trained_on_are_a_warning(write_set: WriteSet) -> None:
    data, held_out = write_set(9), write_set(5)
    assert check_data(config_for(data, held_out)).warnings == ()
    (warning,) = check_data(config_for(data, data)).warnings
    assert "shares 9 of its 9 samples with data.train" in warning


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_classes": 4}, "data.train has 3 classes and model.num_classes=4: set model.num_classes=3"),
        ({"input": {"channels": 4, "height": 3, "width": 3}}, r"= \[2, 1, 3, 3\], the configuration expects \[4, 1, 3"),
    ],
)
def test_another_shape_or_number_of_classes(write_set: WriteSet, model: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_data(config_for(write_set(9), **model))


def test_unlabelled_data_suits_an_unconditional_model_only(write_set: WriteSet) -> None:
    data = write_set(3, class_names=("only",) * 3)
    check_data(config_for(data, condition="none"))
    empty = data.manifest.model_copy(update={"class_names": ()})
    (data.folder / "manifest.json").write(empty.model_dump_json().encode())
    check_data(config_for(data, condition="none"))
    with pytest.raises(DataError, match=r"data.train has no labels: set model\.condition=none"):
        check_data(config_for(data))


def test_validation_must_come_from_the_same_codec(write_set: WriteSet) -> None:
    other = write_set(5, codec=CodecRecord(name="identity", location="identity", scale=(2.0,)))
    with pytest.raises(DataError, match="with other weights or normalization: encode both with the same codec"):
        check_data(config_for(write_set(9), other))
    with pytest.raises(DataError, match=r"data.validation holds latents of shape"):
        check_data(config_for(write_set(9), write_set(5, shape=(2, 1, 4, 4))))


def test_all_training_shapes_must_fit(write_set: WriteSet) -> None:
    data = {"train": write_buckets(write_set, (2, 1, 4, 4), (2, 1, 2, 8), (2, 1, 6, 3))}

    def check(**model: Any) -> DataFacts:
        size = {"input": {"channels": 2, "height": 4, "width": 4}, "patch_size": (1, 1, 1), "num_classes": 3}
        tree = {"model": size | model, "data": data, "run": {"dir": "x"}}
        return check_data(RunConfig.model_validate(tree))

    check()
    with pytest.raises(DataError, match=r"width 3 is not divisible by its model.patch_size entry 2"):
        check(patch_size=(1, 1, 2))
    with pytest.raises(DataError, match=r"the configuration expects \[2, 1, 8, 8\]"):
        check(input={"channels": 2, "height": 8, "width": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__text": {"width": 7, "pooled_width": 5}}, r"set model\.text\.width=6 and model\.text\.pooled_width=5"),
        ({"data__validation": "bare"}, "has no captions: encode data with captions"),
    ],
)
def test_data_that_do_not_fit_a_text_model_are_refused(
    captioned: str, tmp_path: Path, changes: dict, message: str
) -> None:
    if "data__validation" in changes:
        changes = {"data__validation": write_latents(tmp_path / "bare", samples=8)}
    with pytest.raises(DataError, match=message):
        check_data(run_config(tmp_path, captioned, **(TEXT | changes)))


def test_the_encoding_of_captions_is_known_only_to_text_models(captioned: str, tmp_path: Path) -> None:
    assert check_data(run_config(tmp_path, captioned, **TEXT)).text is not None
    assert check_data(run_config(tmp_path, captioned)).text is None
