"""Samples in memory: selection, and members that another safetensors writer laid out."""

import safetensors.torch
import torch

from rdm_scale.data.assembly import stack_raw
from rdm_scale.data.loaded_samples import LoadedSample, parse_in_place, rewrite_in_place
from rdm_scale.data.order import ContiguousRead
from rdm_scale.data.shard_writer import pack_samples
from tests.support.latent_sets import WriteSet, open_reader

LATENTS = torch.arange(3 * 8, dtype=torch.float32).view(3, 2, 1, 2, 2)
IDS, LABELS = torch.tensor([7, 5, 9]), torch.tensor([0, -1, 1])


def test_samples_are_selected_in_order_and_modulo_their_number(write_set: WriteSet) -> None:
    latents = write_set(24, members_per_shard=6)
    (loaded,) = open_reader(latents).get([ContiguousRead(0, 0, 1, 3)])  # samples 4 to 11
    taken, wanted = loaded.take([7, 2, 9]), [11, 6, 5]
    assert list(taken.ids) == latents.ids[wanted].tolist() and list(taken.labels) == latents.labels[wanted].tolist()
    raw = stack_raw([LoadedSample(taken, n) for n in range(3)], latents.latents.shape[1:], latents.latents.dtype)
    assert raw.equal(latents.latents[wanted])


def test_a_packed_member_is_parsed_without_a_copy() -> None:
    content = memoryview(bytearray(pack_samples(LATENTS, IDS, LABELS)))
    parsed = parse_in_place(content, 3, (2, 1, 2, 2), torch.float32)
    assert parsed is not None and (parsed.ids, parsed.labels) == (IDS.tolist(), LABELS.tolist())
    found = torch.frombuffer(content, dtype=torch.float32, count=LATENTS.numel(), offset=parsed.start)
    assert found.equal(LATENTS.flatten())
    assert parse_in_place(content, 2, (2, 1, 2, 2), torch.float32) is None
    assert parse_in_place(content, 3, (2, 1, 2, 2), torch.float16) is None


def test_a_member_of_another_layout_is_rewritten() -> None:
    """With metadata in its header, as other writers add."""
    tensors = {"latents": LATENTS, "ids": IDS, "labels": LABELS}
    content = memoryview(bytearray(safetensors.torch.save(tensors, metadata={"format": "pt"})))
    assert parse_in_place(content, 3, (2, 1, 2, 2), torch.float32) is None
    parsed = rewrite_in_place(content, safetensors.torch.load(bytes(content)))
    assert (parsed.start, parsed.ids, parsed.labels) == (0, IDS.tolist(), LABELS.tolist())
    assert torch.frombuffer(content, dtype=torch.float32, count=LATENTS.numel()).equal(LATENTS.flatten())
