"""Checkpoints of small models, and damage to their files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rdm_scale.checkpoint import CheckpointDirectory
from rdm_scale.checkpoint.convert.checkpoint_writer import write_checkpoint
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.models import build_model
from rdm_scale.storage.location import Location

CODEC = CodecRecord(name="identity", location="identity")


def run_config(**model: Any) -> RunConfig:
    size = {"channels": 3, "height": 8, "width": 8}
    base = {"input": size, "hidden_size": 24, "num_heads": 2, "depth": 2, "num_classes": 5}
    return parse_config({"model": base | model, "data": {"train": "none"}, "run": {"dir": "run"}}, "test")


def save_model(
    directory: Location, step: int, config: RunConfig, damage: Mapping[str, float] | None = None
) -> torch.nn.Module:
    """Save a checkpoint whose EMA weights are the model of seed `step` plus `step`, and whose weights are one more.

    Checkpoints of damaged models also hold what growing needs: an identity and an optimizer state.

    Args:
        damage: value of the first element of parameters, by name.
    """
    model = build_model(config.model, seed=step)
    for p in model.parameters():
        p.data += step
    for name, value in (damage or {}).items():
        model.get_parameter(name).data.view(-1)[0] = value
    state = {
        "step": step,
        "config": config.model_dump(mode="json"),
        "codec": CODEC.model_dump(mode="json"),
        "class_names": list("abcde"),
        "layout": {"tensor": 2, "pipeline": 1, "data": 3},
    }
    tensors = ((name, {"weights": p + 1, "ema": p}) for name, p in model.named_parameters())
    if damage:
        state["identity"] = config.identity()
        tensors = ((name, held | {"exp_avg": held["ema"] * 0, "exp_avg_sq": held["ema"] * 0}) for name, held in tensors)
    write_checkpoint(CheckpointDirectory(directory), state, tensors, 3001)
    return model


def checkpoint_of(run: Location, number: int) -> str:
    return str(CheckpointDirectory(run).folder(number))


def flip(path: Path, offset: int) -> None:
    """Flip the lowest bit of a byte."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def damaged_bytes(name: str, message: str) -> tuple[int, int]:
    """Byte range of the damage to a file according to an error message."""
    found = re.search(rf"{name} is damaged: bytes ([\d,]+) to ([\d,]+) ", message)
    assert found, message
    begin, end = (int(number.replace(",", "")) for number in found.groups())
    return begin, end
