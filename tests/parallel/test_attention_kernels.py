"""Choice of the attention kernel: the fastest of those that work on every rank."""

from typing import Any

import pytest
import torch

from rdm_scale.config import RunConfig, parse_config
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.attention_kernels import (
    AttentionShape,
    attention_shapes,
    choose_attention_kernel,
    fastest_kernel,
)


class OtherRanks:
    """Stands in for the mesh: this rank and others whose results are given."""

    device = torch.device("cpu")

    def __init__(self, *others: dict[str, float | str]) -> None:
        self.others = others

    def all_gather_object(self, own: Any) -> list[Any]:
        return [own, *self.others]


def config_of(**changes: Any) -> RunConfig:
    model = {"hidden_size": 16, "num_heads": 4, "depth": 2, "patch_size": [1, 2, 2]} | changes.pop("model", {})
    return parse_config({"model": model, "data": {"train": "none"}, "run": {"dir": "none"}} | changes, "the test")


def chosen(times: dict[str, float | str], *others: dict[str, float | str]) -> tuple[str | None, list[str]]:
    def measure(name: str, shapes: list[AttentionShape]) -> float:
        if isinstance(times[name], str):
            raise RuntimeError(times[name])
        return float(times[name])

    lines: list[str] = []
    return fastest_kernel([], OtherRanks(*others), lines.append, measure), lines  # type: ignore[arg-type]


def test_the_fastest_kernel_is_chosen_by_the_slowest_rank() -> None:
    assert chosen({"cudnn": 1.0, "flash": 2.0})[0] == "cudnn"
    assert chosen({"cudnn": 1.0, "flash": 2.0}, {"cudnn": 3.0, "flash": 2.5})[0] == "flash"


def test_a_kernel_that_fails_anywhere_is_not_used_and_named() -> None:
    failed = "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"
    best, lines = chosen({"cudnn": failed, "flash": 9.0})
    assert best == "flash" and failed in lines[0]
    assert chosen({"cudnn": 1.0, "flash": 2.0}, {"cudnn": failed, "flash": 2.0})[0] == "flash"
    assert chosen({"cudnn": failed, "flash": failed})[0] is None


def test_shapes_are_those_of_the_run() -> None:
    image = {"input": {"channels": 4, "height": 8, "width": 16}}
    assert attention_shapes(config_of(model=image), 3) == [AttentionShape(1, 12, 32, 4)]
    assert attention_shapes(config_of(model=image, parallel={"tensor": 2}), 3) == [AttentionShape(1, 6, 32, 4)]
    clips = {"input": {"channels": 4, "frames": 5, "height": 8, "width": 8}, "attention": "factorized"}
    expected = [AttentionShape(5, 12, 16, 4), AttentionShape(16, 12, 5, 4)]
    assert attention_shapes(config_of(model=clips), 3) == expected


def test_a_kernel_cannot_be_demanded_where_there_is_none() -> None:
    choose_attention_kernel(config_of(), 1, OtherRanks(), print)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a GPU"):
        choose_attention_kernel(config_of(train={"attention": "cudnn"}), 1, OtherRanks(), print)  # type: ignore[arg-type]
