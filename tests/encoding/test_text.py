"""Text encoders against plain calls of transformers, one caption at a time.

The models are tiny and random, but real: built, saved and loaded by transformers itself.
"""

import pytest
import torch
import transformers

from rdm_scale.data.captions import pack_text
from rdm_scale.encoding.text import TextEncoder
from rdm_scale.errors import DataError
from tests.support.text_encoders import CAPTIONS, SIZES, WIDTH, bert, bert_folder, save, tokenizer


def clip(kind: str):
    config = transformers.CLIPTextConfig(
        **SIZES, projection_dim=12, bos_token_id=2, eos_token_id=3, pad_token_id=0, hidden_act="quick_gelu"
    )
    return getattr(transformers, kind)(config)


def t5(kind: str = "T5EncoderModel"):
    config = transformers.T5Config(
        vocab_size=56, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return getattr(transformers, kind)(config)


CASES = {
    "bert": (lambda: bert(), "[CLS] $A [SEP]", "pooler_output", WIDTH),
    "bert without pooler": (lambda: bert(add_pooling_layer=False), "[CLS] $A [SEP]", None, WIDTH),
    "clip": (lambda: clip("CLIPTextModel"), "[CLS] $A [SEP]", "pooler_output", WIDTH),
    "clip with projection": (lambda: clip("CLIPTextModelWithProjection"), "[CLS] $A [SEP]", "text_embeds", 12),
    "t5": (lambda: t5(), "$A [SEP]", None, WIDTH),
}


@pytest.mark.parametrize("case", CASES)
def test_each_caption_is_what_transformers_makes_of_it_alone(tmp_path, case):
    build, template, pooled, pooled_width = CASES[case]
    model = build().eval()
    folder = save(tmp_path, model, tokenizer(template))
    encoder = TextEncoder(folder)
    assert encoder.record.name == type(model).__name__ and encoder.record.location == folder
    assert (encoder.record.width, encoder.record.pooled_width) == (WIDTH, pooled_width)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for caption, result in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
            output = model(**tokens(caption, return_tensors="pt", return_token_type_ids=False))
            hidden = output.last_hidden_state[0]
            assert len(hidden) == len(result.tokens)
            torch.testing.assert_close(result.tokens, hidden, atol=1e-5, rtol=0)
            expected = getattr(output, pooled)[0] if pooled else hidden.mean(0)
            torch.testing.assert_close(result.pooled, expected, atol=1e-5, rtol=0)
    assert encoder.truncated == 0


def test_whole_models_give_their_text_half(tmp_path):
    whole = t5("T5ForConditionalGeneration")
    encoder = TextEncoder(save(tmp_path / "t5", whole, tokenizer("$A [SEP]")))
    alone = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5").eval()
    expected = alone(torch.tensor([[4, 3]])).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode(["a"])[0].tokens, expected, atol=1e-5, rtol=0)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = clip("CLIPTextModel").config.to_dict()
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    encoder = TextEncoder(save(tmp_path / "clip", transformers.CLIPModel(config), tokenizer("[CLS] $A [SEP]")))
    assert encoder.record.name == "CLIPTextModelWithProjection" and encoder.record.pooled_width == 12
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))  # its weights have a prefix, and no pooler
    encoder = TextEncoder(save(tmp_path / "bert", masked, tokenizer("[CLS] $A [SEP]")))
    expected = masked.bert.eval()(torch.tensor([[2, 4, 3]])).last_hidden_state[0]
    (result,) = encoder.encode(["a"])
    torch.testing.assert_close(result.tokens, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.pooled, result.tokens.mean(0))


def test_the_same_list_gives_the_same_bytes_and_another_one_the_same_numbers(tmp_path):
    encoder = TextEncoder(bert_folder(tmp_path), batch_size=2)
    first, second = encoder.encode(CAPTIONS), encoder.encode(CAPTIONS)
    assert pack_text(first, torch.arange(6), torch.float32) == pack_text(second, torch.arange(6), torch.float32)
    for caption, result in zip(CAPTIONS, first, strict=True):
        (alone,) = encoder.encode([caption])
        torch.testing.assert_close(result.tokens, alone.tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(result.pooled, alone.pooled, atol=1e-5, rtol=0)
    assert encoder.encode([]) == []


def test_computing_in_bfloat16_is_near_and_still_gives_float32(tmp_path):
    folder = bert_folder(tmp_path)
    (exact,), (near,) = (TextEncoder(folder, dtype=dtype).encode(["a red fox"]) for dtype in ("float32", "bfloat16"))
    assert near.tokens.dtype == near.pooled.dtype == torch.float32
    assert 0 < (near.tokens - exact.tokens).norm() / exact.tokens.norm() < 0.03


def test_long_captions_are_cut_before_the_last_special_token_and_counted(tmp_path):
    folder = bert_folder(tmp_path)
    encoder = TextEncoder(folder)
    assert encoder.record.max_tokens == 40
    encoder = TextEncoder(folder, max_tokens=5)
    long, short = encoder.encode(["a b c d e f g", "a b c"])
    assert len(long.tokens) == len(short.tokens) == 5 and encoder.truncated == 1
    torch.testing.assert_close(long.tokens, short.tokens, atol=1e-5, rtol=0)  # [CLS] a b c [SEP]
    with pytest.raises(DataError, match="takes 1 to 64 tokens, not 65"):
        TextEncoder(folder, max_tokens=65)


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path):
    with pytest.raises(DataError, match="adds no special tokens"):
        TextEncoder(save(tmp_path, bert(), tokenizer("")))
