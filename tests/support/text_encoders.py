"""Tiny text encoders with random weights and a tokenizer of letters, saved as transformers saves them."""

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

CAPTIONS = ["a red fox", "", "two dogs run over the hill and a cat", "Größe", "a", "the quick brown fox jumps " * 2]
WIDTH = 16
SIZES = {
    "vocab_size": 56,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def tokenizer(template: str, pad: str = "[PAD]", **options: object):
    """Words of single letters; `template` places the special tokens, for instance "[CLS] $A [SEP]"."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, vocabulary[token]) for token in special]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, unk_token="[UNK]", **options)


def bert(**options: object):
    return transformers.BertModel(transformers.BertConfig(**SIZES), **options)


def save(folder, model, tokens, **options: object) -> str:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # transformers' own initialization is nearly no function at all
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, **options)
    tokens.save_pretrained(folder)
    return str(folder)


def bert_folder(folder, **options: object) -> str:
    return save(folder, bert(**options), tokenizer("[CLS] $A [SEP]", model_max_length=40))
