"""Folders of text encoders: every layout that is read, what is left unused, and folders that are refused."""

import json
import shutil

import fsspec
import pytest
import safetensors.torch
import torch
import transformers

from rdm_scale.encoding.text import TextEncoder
from rdm_scale.errors import DataError
from tests.support.text_encoders import CAPTIONS, WIDTH, bert, bert_folder


def sentence_transformer(folder, *modes: str, normalize: bool = False) -> str:
    """The layout that sentence-transformers writes."""
    bert_folder(folder)
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {"word_embedding_dimension": WIDTH} | {f"pooling_mode_{name}": name in modes for name in known}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return str(folder)


@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        ("cls_token", lambda tokens: tokens[0]),
        ("mean_tokens", lambda tokens: tokens.sum(0) / len(tokens)),
        ("max_tokens", lambda tokens: tokens.max(dim=0).values),
    ],
)
def test_the_pooling_of_sentence_transformers(tmp_path, mode, pool):
    encoder = TextEncoder(sentence_transformer(tmp_path / "plain", mode))
    assert encoder.record.max_tokens == 24
    for result in encoder.encode(CAPTIONS):
        torch.testing.assert_close(result.pooled, pool(result.tokens))
    scaled = TextEncoder(sentence_transformer(tmp_path / "unit", mode, normalize=True))
    for result in scaled.encode(CAPTIONS):
        pooled = pool(result.tokens)
        torch.testing.assert_close(result.pooled, pooled / pooled.square().sum().sqrt())
    assert scaled.record.digest != encoder.record.digest


def test_a_variant_is_the_same_encoder(tmp_path):
    folder = bert_folder(tmp_path / "plain")
    variant = shutil.copytree(folder, tmp_path / "variant")
    (tmp_path / "variant/model.safetensors").rename(tmp_path / "variant/model.fp16.safetensors")
    assert TextEncoder(str(variant)).record.digest == TextEncoder(folder).record.digest


def test_pooling_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"1_Pooling/config\.json has the pooling modes pooling_mode_mean_sqrt_len_tokens"
    ):
        TextEncoder(sentence_transformer(tmp_path / "a", "mean_sqrt_len_tokens"))
    folder = sentence_transformer(tmp_path / "b", "mean_tokens")
    modules = json.loads((tmp_path / "b/modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "b/modules.json").write_text(json.dumps(modules))
    with pytest.raises(DataError, match="lists Transformer, Pooling, Dense"):
        TextEncoder(folder)
    modules[1:] = [{"type": "sentence_transformers.models.Pooling", "path": "../../elsewhere"}]
    (tmp_path / "b/modules.json").write_text(json.dumps(modules))
    with pytest.raises(DataError, match="not a module"):
        TextEncoder(folder)


def test_weights_in_several_files_and_on_another_file_system(tmp_path):
    local = bert_folder(tmp_path / "one")
    model = transformers.BertModel.from_pretrained(local)
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "many" / name)
    assert not (tmp_path / "many/model.safetensors").exists()
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "many"), "/captions_test/", recursive=True)
    (expected,) = TextEncoder(local).encode(["a red fox"])
    digests = set()
    for url in (str(tmp_path / "many"), "memory://captions_test/many"):
        encoder = TextEncoder(url)
        (result,) = encoder.encode(["a red fox"])
        assert torch.equal(result.tokens, expected.tokens) and torch.equal(result.pooled, expected.pooled)
        digests.add(encoder.record.digest)
    assert len(digests) == 1 and encoder.record.location == "memory:///captions_test/many"
    next((tmp_path / "many").glob("model-*.safetensors")).unlink()
    with pytest.raises(DataError, match=r"lacks model-.*safetensors, which model\.safetensors\.index\.json names"):
        TextEncoder(str(tmp_path / "many"))


def test_the_tokenizer_settings_of_older_versions(tmp_path):
    """Settings like those of the published MiniLM, with the tokenizer's class by name, and where it came from."""
    folder = bert_folder(tmp_path)
    (expected,) = TextEncoder(folder).encode(["a red fox"])
    settings = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls")} | {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "strip_accents": None,
        "model_max_length": 32,
        "name_or_path": "elsewhere/else",
        "special_tokens_map_file": "/nowhere/map.json",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = TextEncoder(folder)
    assert torch.equal(encoder.encode(["a red fox"])[0].tokens, expected.tokens) and encoder.record.max_tokens == 32
    (tmp_path / "tokenizer_config.json").unlink()
    assert torch.equal(TextEncoder(folder).encode(["a red fox"])[0].tokens, expected.tokens)


def test_the_digest_is_of_weights_and_tokenizer(tmp_path):
    first = TextEncoder(bert_folder(tmp_path / "a")).record
    assert len(first.digest) == 64
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/README.md").write_text("of no matter")
    assert TextEncoder(str(tmp_path / "b")).record.digest == first.digest
    tokens = (tmp_path / "b/tokenizer.json").read_text()
    (tmp_path / "b/tokenizer.json").write_text(tokens.replace('"Lowercase"', '"NFC"'))
    assert TextEncoder(str(tmp_path / "b")).record.digest != first.digest


def test_pickled_weights_are_refused(tmp_path):
    folder = bert_folder(tmp_path)
    torch.save(bert().state_dict(), tmp_path / "pytorch_model.bin")
    TextEncoder(folder)  # beside safetensors they do no harm: they are not looked at
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"only pytorch_model\.bin, and pickled weights are not loaded"):
        TextEncoder(folder)


def edit(path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def test_code_adapters_and_kernels_in_the_folder_are_not_used(tmp_path):
    folder = bert_folder(tmp_path)
    (expected,) = TextEncoder(folder).encode(["a"])
    (tmp_path / "evil.py").write_text("raise SystemExit('code was run')")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/else", "peft_type": "LORA"}')
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    edit(tmp_path / "config.json", auto_map=code, attn_implementation="elsewhere/kernels")
    edit(tmp_path / "tokenizer_config.json", auto_map=code)
    (result,) = TextEncoder(folder).encode(["a"])
    assert torch.equal(result.tokens, expected.tokens)


def damage(folder, what: str) -> None:
    weights = folder / "model.safetensors"
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    elif what == "missing weight":
        state = safetensors.torch.load(weights.read_bytes())
        del state["encoder.layer.1.output.dense.weight"]
        safetensors.torch.save_file(state, weights, {"format": "pt"})
    elif what == "nan":
        state = safetensors.torch.load(weights.read_bytes())
        state["embeddings.LayerNorm.weight"][0] = float("nan")
        safetensors.torch.save_file(state, weights, {"format": "pt"})
    elif what == "huge":
        edit(folder / "config.json", vocab_size=10**12)
    elif what == "deep":
        edit(folder / "config.json", num_hidden_layers=10**9)
    elif what == "kind":
        edit(folder / "config.json", model_type="llama")
    elif what == "code":
        edit(folder / "config.json", model_type="evil", auto_map={"AutoModel": "evil.Model"})
    elif what == "quantized":
        edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "bad tokenizer":
        (folder / "tokenizer.json").write_text('{"model": "x"}')
    elif what == "tokens beyond the table":
        edit(folder / "config.json", vocab_size=2)
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "config":
        (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut", "cannot load a text encoder"),
        ("garbage", "cannot load a text encoder"),
        ("missing weight", r"1 weights are missing, the first is encoder\.layer\.1\.output\.dense\.weight"),
        ("nan", "not finite"),
        ("huge", "the configuration describes 16000"),
        ("deep", "num_hidden_layers is 1000000000, and at most 1000"),
        ("kind", "contains a llama model: supported text encoders are albert, bert"),
        ("code", "contains a evil model"),
        ("quantized", "quantized"),
        ("no tokenizer", r"has no tokenizer\.json"),
        ("bad tokenizer", "cannot load a text encoder"),
        ("tokens beyond the table", "cannot load a text encoder"),
        ("no config", "there is no text encoder"),
        ("config", r"config\.json is not a JSON object"),
    ],
)
def test_folders_that_are_refused(tmp_path, what, message):
    folder = bert_folder(tmp_path / "encoder")
    damage(tmp_path / "encoder", what)
    with pytest.raises(DataError, match=message):
        TextEncoder(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"there is no text encoder .*nothing"):
        TextEncoder(str(tmp_path / "nothing"))
