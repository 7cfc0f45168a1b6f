"""Batches: shapes, padding on either side, every example once, streams that resume."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pyrolora.models.tasks import Example, OptionScoring, Split, Task, Verbaliser, encode

PAD = 1


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<pad>", "word", "yes", "no", ":", "red", "green", "blue", "?"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


@pytest.fixture
def tokenizer():
    return word_tokenizer(pad_token="<pad>")


YES_NO = Verbaliser("{text} :", labels=("yes", "no"))


def text_split(lengths: list[int]) -> Split:
    examples = [
        Example({"text": "word " * length}, number % 2, id=str(number)) for number, length in enumerate(lengths)
    ]
    return Split("train", "toy", tuple(examples), 2)


def scrambled(count: int) -> list[int]:
    return [1 + (number * 37) % 53 for number in range(count)]


def indices(batches) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def padded_share(batches) -> float:
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


class TestBatch:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_label_rows_are_padded_on_the_side_asked_for(self, tokenizer, side):
        batch = encode(text_split([1, 3]), YES_NO, tokenizer, padding=side).batch([0, 1])
        short = [2, 5, PAD, PAD] if side == "right" else [PAD, PAD, 2, 5]
        assert batch["input_ids"].tolist() == [short, [2, 2, 2, 5]]
        assert batch["attention_mask"].tolist() == [[int(token != PAD) for token in short], [1] * 4]
        assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_option_rows(self, tokenizer, side):
        examples = (
            Example({"q": "word word ?"}, 1, ("red", "green", "blue blue")),
            Example({"q": "word ?"}, 0, ("red red", "blue")),
        )
        split = Split("test", "toy", examples, 4)
        batch = encode(split, OptionScoring("{q}"), tokenizer, padding=side).batch([0, 1])

        def placed(row, fill):
            return [fill] * 2 + row if side == "left" else row + [fill] * 2

        assert batch["input_ids"].tolist() == [[2, 2, 9, 6, 7, 8, 8], placed([2, 9, 6, 6, 8], PAD)]
        assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 3, 4, 4], placed([1, 1, 2, 2, 3], 0)]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 3, 3, 4], placed([0, 1, 2, 3, 2], 0)]
        assert batch["scored"].tolist() == [
            [False] * 3 + [True] * 4,
            placed([False, False, True, True, True], False),
        ]
        # four columns, because the task has questions with four options even if none is in this batch
        assert batch["option_mask"].tolist() == [[True, True, True, False], [True, True, False, False]]
        assert batch["option_lengths"].tolist() == [[1.0, 1.0, 2.0, 1.0], [2.0, 1.0, 1.0, 1.0]]
        assert batch["labels"].tolist() == [1, 0]
        assert batch["option_lengths"].dtype == torch.float32

    def test_more_options_than_the_task_has_widen_the_table(self, tokenizer):
        split = Split("test", "toy", (Example({"q": "?"}, 0, ("red", "blue", "green")),), 2)
        assert encode(split, OptionScoring("{q}"), tokenizer).classes == 3

    def test_end_token_fills_when_there_is_no_padding_token(self):
        encoded = encode(text_split([1, 2]), YES_NO, word_tokenizer(eos_token="?"))
        assert encoded.batch([0, 1])["input_ids"][0, 0] == 9

    def test_neither_padding_nor_end_token(self):
        with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
            encode(text_split([1, 2]), YES_NO, word_tokenizer())


class TestEncode:
    def test_what_is_kept(self, tokenizer):
        encoded = encode(text_split([2, 1, 4]), YES_NO, tokenizer)
        assert len(encoded) == 3
        assert encoded.labels.tolist() == [0, 1, 0]
        assert encoded.lengths.tolist() == [3, 2, 5]
        assert (encoded.kind, encoded.label_ids, encoded.classes) == ("label", (3, 4), 2)

    def test_tokenised_once(self, tokenizer, monkeypatch):
        encoded = encode(text_split([2, 1, 4]), YES_NO, tokenizer)

        def refuse(*_, **__):
            raise RuntimeError("tokenised again")

        monkeypatch.setattr(type(tokenizer), "__call__", refuse)
        assert len(list(encoded.batches(2))) == 2

    def test_a_task_is_no_split(self, tokenizer):
        split = text_split([1, 2])
        made = Task("toy", ("yes", "no"), YES_NO, split, split, split, "", "")
        with pytest.raises(TypeError, match=r"got the task 'toy', expected one of its splits"):
            encode(made, YES_NO, tokenizer)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [({"padding": "middle"}, "padding='middle'"), ({"max_length": 0}, "max_length=0")],
    )
    def test_bad_settings(self, tokenizer, changes, said):
        with pytest.raises(ValueError, match=said):
            encode(text_split([1]), YES_NO, tokenizer, **changes)


class TestRequireTrainable:
    def test_returns_the_split(self, tokenizer):
        encoded = encode(text_split([1, 2]), YES_NO, tokenizer)
        assert encoded.require_trainable() is encoded

    def test_empty(self, tokenizer):
        with pytest.raises(ValueError, match="toy train has no examples"):
            encode(text_split([]), YES_NO, tokenizer).require_trainable()

    def test_empty_split_gives_no_batches(self, tokenizer):
        assert list(encode(text_split([]), YES_NO, tokenizer).batches(4)) == []

    def test_one_class(self, tokenizer):
        with pytest.raises(ValueError, match=r"toy train has one class only \(0\) in 1 examples"):
            encode(text_split([1]), YES_NO, tokenizer).require_trainable()

    def test_foreign_labels(self, tokenizer):
        examples = tuple(Example({"text": "word"}, label) for label in (0, 2))
        with pytest.raises(ValueError, match=r"has the labels \[0, 2\], expected 0 to 1"):
            encode(Split("test", "other", examples, 3), YES_NO, tokenizer).require_trainable()

    def test_options_in_one_place_are_no_single_class(self, tokenizer):
        split = Split("train", "toy", (Example({"q": "?"}, 0, ("red", "blue")),) * 2, 2)
        assert len(encode(split, OptionScoring("{q}"), tokenizer).require_trainable()) == 2


class TestOrder:
    @pytest.fixture
    def encoded(self, tokenizer):
        return encode(text_split(scrambled(203)), YES_NO, tokenizer)

    def test_unshuffled_is_sorted_and_complete(self, encoded):
        order = list(itertools.chain(*indices(encoded.batches(8))))
        assert sorted(order) == list(range(203))
        assert encoded.lengths[order].diff().min() >= 0

    def test_index_restores_labels_and_rows(self, encoded):
        for batch in encoded.batches(8, shuffle=True):
            assert batch["labels"].tolist() == encoded.labels[batch["index"]].tolist()
            assert batch["attention_mask"].sum(1).tolist() == encoded.lengths[batch["index"]].tolist()

    @pytest.mark.parametrize("size", [1, 8, 203, 500])
    def test_shuffled_holds_every_example_once(self, encoded, size):
        generator = torch.Generator().manual_seed(3)
        order = indices(encoded.batches(size, shuffle=True, generator=generator))
        assert sorted(itertools.chain(*order)) == list(range(203))
        assert len(order) == encoded.steps_per_epoch(size)

    def test_drop_last_leaves_full_batches_only(self, encoded):
        order = indices(encoded.batches(8, shuffle=True, drop_last=True))
        assert [len(batch) for batch in order] == [8] * 25
        assert len(set(itertools.chain(*order))) == 200
        assert encoded.steps_per_epoch(8, drop_last=True) == 25

    def test_the_generator_decides(self, encoded):
        first, second, third = (
            indices(encoded.batches(8, shuffle=True, generator=torch.Generator().manual_seed(seed)))
            for seed in (0, 0, 1)
        )
        assert first == second
        assert first != third

    def test_shuffling_is_not_sorting(self, encoded):
        generator = torch.Generator().manual_seed(0)
        widths = [batch["input_ids"].shape[1] for batch in encoded.batches(8, shuffle=True, generator=generator)]
        assert widths != sorted(widths)

    def test_buckets_save_padding(self, encoded):
        generator = torch.Generator().manual_seed(0)
        bucketed = padded_share(encoded.batches(8, shuffle=True, generator=generator))
        plain = torch.randperm(203, generator=generator).split(8)
        assert bucketed < 0.5 * padded_share(encoded.batch(places.tolist()) for places in plain)

    def test_generator_without_shuffle(self, encoded):
        with pytest.raises(ValueError, match="shuffle is False"):
            encoded.batches(8, generator=torch.Generator())

    def test_size_below_one(self, encoded):
        with pytest.raises(ValueError, match="A batch of 0 examples"):
            encoded.batches(0)


class TestStream:
    @pytest.fixture
    def encoded(self, tokenizer):
        return encode(text_split(scrambled(50)), YES_NO, tokenizer)

    def take(self, encoded, count, **settings):
        return indices(itertools.islice(encoded.stream(8, **settings), count))

    def test_every_epoch_holds_every_example_once(self, encoded):
        order = self.take(encoded, 21, seed=0)  # three epochs of seven steps
        epochs = [order[begin : begin + 7] for begin in (0, 7, 14)]
        assert all(sorted(itertools.chain(*epoch)) == list(range(50)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]

    @pytest.mark.parametrize("start", [1, 6, 7, 8, 17])
    @pytest.mark.parametrize("drop_last", [False, True])
    def test_resumes_where_it_stopped(self, encoded, start, drop_last):
        whole = self.take(encoded, 24, seed=5, drop_last=drop_last)
        assert self.take(encoded, 24 - start, seed=5, start=start, drop_last=drop_last) == whole[start:]

    def test_global_random_state_is_neither_read_nor_moved(self, encoded):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = self.take(encoded, 10, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert self.take(encoded, 10, seed=1) == first

    def test_neighbouring_seeds_share_no_epoch(self, encoded):
        assert self.take(encoded, 7, seed=0, start=7) != self.take(encoded, 7, seed=1)
        assert self.take(encoded, 7, seed=0) != self.take(encoded, 7, seed=1)

    def test_too_few_examples_for_a_batch(self, tokenizer):
        encoded = encode(text_split([1, 2]), YES_NO, tokenizer)
        with pytest.raises(ValueError, match="2 examples, too few for a batch of 8"):
            encoded.stream(8, seed=0, drop_last=True)

    @pytest.mark.parametrize("settings", [{"seed": -1}, {"seed": 0, "start": -1}])
    def test_negative_numbers(self, encoded, settings):
        with pytest.raises(ValueError, match="expected both to be 0 or more"):
            encoded.stream(8, **settings)
