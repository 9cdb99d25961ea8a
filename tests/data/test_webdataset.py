"""The code in docs/data.md reads shards with stock webdataset."""

import re
from pathlib import Path

import pytest

from tests.support.latent_sets import WriteSet

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_stock_webdataset_reads_the_shards(write_set: WriteSet, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = write_set(12)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert code.strip().count("\n") < 12
    names: dict[str, object] = {}
    exec(code.replace("data/quickstart/latents/shard-000000.tar", f"{latents.url}/shard-000000.tar"), names)
    read = list(names["dataset"])  # type: ignore[call-overload]
    assert [sample["label"] for sample in read] == latents.labels.tolist()
    assert all(sample["latents"].equal(expected) for sample, expected in zip(read, latents.latents, strict=True))
