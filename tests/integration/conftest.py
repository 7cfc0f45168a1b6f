"""A tiny Llama in a folder of its own and a data set of reviews, for tests that go through files."""

import json
import random

import pytest

GOOD, BAD = ("good", "happy", "love", "great"), ("bad", "sad", "hate", "poor")
NEUTRAL = (
    "phone",
    "case",
    "battery",
    "screen",
    "cable",
    "price",
    "box",
    "i",
    "we",
    "it",
    "this",
    "a",
    "very",
    "is",
    "was",
)
# 100 rows go to validation and 300 to test
ROWS = 460


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random two-layer Llama with a word-level tokenizer, as `save_pretrained` writes them."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *GOOD, *BAD, *NEUTRAL, "review", "sentiment", ":", "positive", "negative"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("backbone") / "tiny"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A ``data_dir`` of uci_sentiment whose label is the one telling word of each text."""
    chance, lines, seen = random.Random(0), [], set()
    while len(lines) < ROWS:
        label = len(lines) % 2
        words = [chance.choice((BAD, GOOD)[label]), *chance.choices(NEUTRAL, k=5)]
        chance.shuffle(words)
        text = " ".join(words)
        if text not in seen:
            seen.add(text)
            lines.append(json.dumps({"text": text, "label": ("negative", "positive")[label]}))
    folder = tmp_path_factory.mktemp("data")
    (folder / "amazon.jsonl").write_text("\n".join(lines))
    return folder
