"""Members of side-car shards: packed captions are read back, and invalid members are refused."""

import pytest
import safetensors.torch
import torch

from rdm_scale.data.captions import EncodedText, pack_text, unpack_text
from rdm_scale.errors import DataError


def some_texts(*lengths: int) -> list[EncodedText]:
    generator = torch.Generator().manual_seed(0)
    return [EncodedText(torch.randn(n, 4, generator=generator), torch.randn(3, generator=generator)) for n in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_captions_are_read_back(dtype):
    texts, ids = some_texts(3, 1, 5), torch.tensor([7, 2**62, 1])
    content = pack_text(texts, ids, dtype)
    assert content == pack_text(texts, ids, dtype)
    text = unpack_text(content, 3, 4, 3, dtype)
    assert text.offsets.tolist() == [0, 3, 4, 9] and torch.equal(text.ids, ids)
    for k, one in enumerate(texts):
        assert torch.equal(text.tokens[text.offsets[k] : text.offsets[k + 1]], one.tokens.to(dtype))
        assert torch.equal(text.pooled[k], one.pooled.to(dtype))


def test_values_beyond_the_dtype_are_refused():
    texts = [EncodedText(torch.full((1, 4), 1e5), torch.zeros(3))]
    with pytest.raises(DataError, match=r"not finite in torch\.float16"):
        pack_text(texts, torch.tensor([1]), torch.float16)


def repacked(**values: torch.Tensor | None) -> bytes:
    tensors = safetensors.torch.load(pack_text(some_texts(2, 1), torch.tensor([1, 2]), torch.float32)) | values
    return safetensors.torch.save({name: value for name, value in tensors.items() if value is not None})


VALID = repacked()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (VALID[:-1], "not a safetensors file"),
        (repacked(ids=None), r"holds \['offsets', 'text_pooled', 'tokens'\] instead of"),
        (repacked(more=torch.zeros(1)), "instead of"),
        (repacked(ids=torch.tensor([1])), r"ids \[1\] in torch.int64, expected \[2\]"),
        (repacked(ids=torch.tensor([1.0, 2.0])), "ids .* in torch.float32"),
        (repacked(tokens=torch.zeros(3, 5)), r"tokens \[3, 5\]"),
        (repacked(tokens=torch.zeros(3, 4, 1)), r"tokens \[3, 4, 1\]"),
        (repacked(tokens=torch.zeros(4, 4)), "offsets that do not divide 4 tokens into 2 captions"),
        (repacked(text_pooled=torch.zeros(2, 4)), r"text_pooled \[2, 4\]"),
        (repacked(offsets=torch.tensor([0, 4, 3])), "offsets"),
        (repacked(offsets=torch.tensor([1, 2, 3])), "offsets"),
        (repacked(offsets=torch.tensor([0, -1, 3])), "offsets"),
        (repacked(tokens=torch.full((3, 4), float("nan"))), "not finite"),
        (repacked(text_pooled=torch.full((2, 3), float("inf"))), "not finite"),
    ],
)
def test_invalid_members_are_refused(content, message):
    with pytest.raises(DataError, match=message) as caught:
        unpack_text(content, 2, 4, 3, torch.float32, "member 1 of text-000000.tar")
    assert "member 1 of text-000000.tar" in str(caught.value)
    unpack_text(VALID, 2, 4, 3, torch.float32)
