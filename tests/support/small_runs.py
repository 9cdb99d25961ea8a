"""Small training runs for the tests."""

import base64
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.data.captions import EncodedText, pack_text
from rdm_scale.data.manifest import Shard, TarIndex, TextEncoding, read_manifest
from rdm_scale.data.shard_writer import PackedMember, ShardWriter, write_tar
from rdm_scale.data.shards import read_bytes
from rdm_scale.storage.location import Location

TIMINGS = {"step_s", "tokens_per_s", "samples_per_s", "tflops_per_rank", "mfu", "data_wait_s", "data_wait_share"} | {
    "save_stall_s",
    "failed_saves",
}


def write_latents(
    folder: Path,
    samples: int = 96,
    classes: int = 4,
    seed: int = 0,
    channels: int = 4,
    size: tuple[int, int, int] = (1, 8, 8),
) -> str:
    """Write latents [channels, *size] whose mean depends on the label, and return the manifest's path."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    latents = torch.randn(samples, channels, *size, generator=generator) * 0.5 + (labels - 1.5).view(-1, 1, 1, 1, 1)
    codec = CodecRecord(name="identity", location="identity")
    names = tuple(f"class {i}" for i in range(classes))
    writer = ShardWriter(
        Location(folder),
        kind="mode",
        dtype="float32",
        shape=(channels, *size),
        codec=codec,
        class_names=names,
        samples_per_member=8,
        members_per_shard=4,
    )
    writer.add(latents, torch.arange(samples) + 1000, labels)
    writer.close()
    return str(folder / "manifest.json")


def caption_of(key: int, width: int = 6, pooled_width: int = 5) -> EncodedText:
    """A caption of one to five tokens, as a function of the id of its sample."""
    generator = torch.Generator().manual_seed(key)
    tokens = torch.randn(1 + key % 5, width, generator=generator)
    return EncodedText(tokens, torch.randn(pooled_width, generator=generator))


def add_captions(manifest_path: str, width: int = 6, pooled_width: int = 5) -> None:
    """Give every sample of a data set the caption of its id; that of id 0 is the empty one."""
    manifest, folder = read_manifest(manifest_path)

    def caption(key: int) -> EncodedText:
        return caption_of(key, width, pooled_width)

    def side_car(shard: Shard) -> TarIndex:
        packed = []
        for number, member in enumerate(shard.members):
            ids = safetensors.torch.load(read_bytes(folder, shard, number))["ids"]
            content = pack_text([caption(key) for key in ids.tolist()], ids, torch.float32)
            packed.append(PackedMember(member.name, len(ids), content))
        return write_tar(folder, shard.name.replace("shard", "text"), packed)

    empty = base64.b64encode(pack_text([caption(0)], torch.zeros(1, dtype=torch.int64), torch.float32)).decode()
    how = TextEncoding(
        encoder="none", location="none", digest="", width=width, pooled_width=pooled_width, max_tokens=5,
        dtype="float32", empty=empty,
    )  # fmt: skip
    shards = tuple(shard.model_copy(update={"text": side_car(shard)}) for shard in manifest.shards)
    (folder / "manifest.json").write(manifest.model_copy(update={"shards": shards, "text": how}).to_json())


def run_config(tmp_path: Path, data: str | list[dict[str, str]], **changes: Any) -> RunConfig:
    """Configuration of a run of a small model (60,000 parameters); `changes` are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "model": {
            "input": {"channels": 4, "height": 8, "width": 8},
            "hidden_size": 32,
            "num_heads": 4,
            "depth": 3,
            "num_classes": 4,
        },
        "data": {"train": data},
        "optimizer": {"lr": 2e-3, "warmup_steps": 4, "weight_decay": 0.01, "eps": 1e-6, "ema_decay": 0.99},
        "train": {"steps": 20, "global_batch_size": 8, "seed": 3},
        "monitor": {"tensorboard": False, "log_every": 1000},
        "checkpoint": {"every": 0},
        "parallel": {"timeout_s": 300},
        "run": {"dir": str(tmp_path / "run")},
    }
    for key, value in changes.items():
        *path, name = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    return parse_config(tree, "the test")


def train(config: RunConfig) -> None:
    """Run on each rank: train from start to end."""
    from rdm_scale.train import train

    train(config)


def metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The reproducible fields of every step."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
