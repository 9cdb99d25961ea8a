"""Data that does not fit the model is refused before anything is built."""

import json
from typing import Any

import pytest

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import RunConfig
from rdm_scale.data.compatibility import DataFacts, check_data
from rdm_scale.errors import DataError
from tests.support.latent_sets import LatentSet, WriteSet


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
    with pytest.raises(DataError, match="with other weights or scale: encode both with the same codec"):
        check_data(config_for(write_set(9), other))
    with pytest.raises(DataError, match=r"data.validation holds latents of shape"):
        check_data(config_for(write_set(9), write_set(5, shape=(2, 1, 4, 4))))


def bucketed(write_set: WriteSet, *shapes: tuple[int, int, int, int]) -> str:
    """One set with a shard of each shape."""
    parts = [write_set(12, shape=shape, members_per_shard=3) for shape in shapes]
    tree = json.loads((parts[0].folder / "manifest.json").read())
    for number, part in enumerate(parts[1:], 1):
        shard = json.loads(part.manifest.shards[0].model_dump_json(exclude_none=True))
        name = f"shard-{number:06d}.tar"
        (parts[0].folder / name).write((part.folder / shard["name"]).read())
        tree["shards"].append(shard | {"name": name, "shape": list(shapes[number])})
        tree["samples"] += shard["samples"]
    (parts[0].folder / "manifest.json").write(json.dumps(tree).encode())
    return parts[0].url


def test_shapes_that_take_turns_must_all_fit(write_set: WriteSet) -> None:
    data = {"train": bucketed(write_set, (2, 1, 4, 4), (2, 1, 2, 8), (2, 1, 6, 3))}

    def check(**model: Any) -> DataFacts:
        size = {"input": {"channels": 2, "height": 4, "width": 4}, "patch_size": (1, 1, 1), "num_classes": 3}
        tree = {"model": size | model, "data": data, "run": {"dir": "x"}}
        return check_data(RunConfig.model_validate(tree))

    check()
    with pytest.raises(DataError, match=r"width 3 is not divisible by its model.patch_size entry 2"):
        check(patch_size=(1, 1, 2))
    with pytest.raises(DataError, match=r"the configuration expects \[2, 1, 8, 8\]"):
        check(input={"channels": 2, "height": 8, "width": 8})
