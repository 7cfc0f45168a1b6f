"""From a template and an example to token ids: filling in, tokenising, and what follows a prompt.

Token ids are those of ``tokenizer(text)`` as it is configured: a beginning-of-sequence token is there only if
the tokenizer adds one itself. An end-of-sequence token is taken off, because the answer is read where the
text stops.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyrolora.models.naming import suggestion
from pyrolora.models.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one example; the other lists stay empty unless options are scored.

    Args:
        input_ids: the prompt, followed by every option where options are scored.
        segment_ids: 1 for the prompt, 2 + k for option k.
        position_ids: position of each token; every option restarts right after the prompt.
        scored: whether the token's log-likelihood counts for its option.
        option_lengths: what the sum of each option's log-likelihoods is divided by.
        items: number of the item whose embedding a token stands for, -1 where it is a word; empty without items.
    """

    input_ids: list[int]
    segment_ids: list[int]
    position_ids: list[int]
    scored: list[bool]
    option_lengths: list[float]
    items: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)


def template_fields(template: str) -> tuple[str, ...]:
    """Return the names in braces, in order and once each.

    Usage: ``template_fields("Question: {question}")`` gives ``("question",)``.

    Raises:
        ValueError: unbalanced braces, or something other than a plain name in them.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"The template {template!r} is not well formed: {error}. Write a literal brace twice."
        ) from error
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"The template {template!r} has {{{name}}}, expected a field name such as {{text}}.")
    return tuple(dict.fromkeys(names))


def template_tail(template: str) -> str:
    """Return the text after the last field, which every prompt of the template ends in."""
    literal, field, _, _ = list(string.Formatter().parse(template))[-1]
    return "" if field is not None else literal


def fill(template: str, example: Example, extra: Mapping[str, str] | None = None) -> str:
    """Return the template with the example's fields in it.

    Usage: ``fill("Topic of: {text}", example)``.

    Args:
        template: text with field names in braces.
        example: gives the fields. It may come from another task, as long as it has the fields that are named.
        extra: further names the format itself fills in.

    Raises:
        ValueError: the example lacks a field; names those it has.
    """
    values = {**example.fields, **(extra or {})}
    for name in template_fields(template):
        if name not in values:
            raise ValueError(
                f"Example {example.id!r} has the fields {sorted(example.fields)}, but the prompt expects "
                f"{name!r}."
                f"{suggestion(name, example.fields)} To ask one task's question of another's examples, give "
                "both the "
                "same field names."
            )
    return template.format_map(values)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without an end-of-sequence token.

    Usage: ``token_ids(tokenizer, ["Topic:"])``.
    """
    if not texts:
        return []
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    distinct = list(dict.fromkeys(texts))  # a prompt comes once for each of its options
    found = {}
    encoded = tokenizer(distinct, padding=False, truncation=False, verbose=False).input_ids
    for text, ids in zip(distinct, encoded, strict=True):
        stop = len(ids)
        while stop and ids[stop - 1] in ends:
            stop -= 1
        found[text] = list(ids[:stop])
    return [found[text] for text in texts]


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], continuations: Sequence[str]
) -> list[list[int]]:
    """Return the token ids that each continuation adds to its prompt.

    Usage: ``continuation_ids(tokenizer, ["Topic:"], [" sport"])``.

    Both are tokenised together, because some tokenizers write a word differently at the start of a text.
    Where the boundary does not survive (a token would span it) the continuation is tokenised alone.
    """
    if not any(continuations):
        return [[] for _ in prompts]
    before = token_ids(tokenizer, prompts)
    joint = token_ids(tokenizer, [prompt + text for prompt, text in zip(prompts, continuations, strict=True)])
    found = []
    for prompt, whole, text in zip(before, joint, continuations, strict=True):
        survives = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        alone = not survives and text
        found.append(list(tokenizer(text, add_special_tokens=False).input_ids) if alone else whole[len(prompt) :])
    return found


def spaced(prompt_end: str, word: str, separator: str) -> str:
    """Return the word as it stands after a prompt: after the separator, unless white space is there already.

    Raises:
        ValueError: white space on both sides, which most tokenizers turn into a token no text ever has.
    """
    if prompt_end[-1:].isspace():
        if word[:1].isspace():
            raise ValueError(
                f"The prompt ends in white space and {word!r} starts with it. Take it off the end of the template."
            )
        return word
    return word if word[:1].isspace() else separator + word


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, words: Sequence[str], separator: str
) -> tuple[int, ...]:
    r"""Return the first token of each word after the template's end: the vocabulary rows of the labels.

    Usage: ``first_tokens(tokenizer, "Headline: {text}\nTopic:", (" sport", " tech"), " ")``.

    A word may take several tokens as long as its first one says which word it is.

    Raises:
        ValueError: an empty word, a word that is unknown to the tokenizer or starts with a token of white
            space, or two words with the same first token (names both).
    """
    tail = template_tail(template)
    for word in words:
        if not word.strip():
            raise ValueError(f"The label {word!r} is empty; give every label a word. Labels: {list(words)}.")
    written = [spaced(tail, word, separator) for word in words]
    owner: dict[int, str] = {}
    for word, ids in zip(words, continuation_ids(tokenizer, [tail] * len(words), written), strict=True):
        pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
        if not ids or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"The label {word!r} is not in the tokenizer's vocabulary ({pieces}); use another word.")
        if not str(tokenizer.decode(ids[:1])).strip():
            raise ValueError(
                f"The tokenizer splits the label {word!r} into {pieces}, and the first token is white space, "
                "which says "
                "nothing about the label; change the white space around it or use another word."
            )
        if ids[0] in owner:
            raise ValueError(
                f"The labels {owner[ids[0]]!r} and {word!r} both start with the token {pieces[0]!r}, so the "
                "model "
                "cannot tell them apart; use another word for one of them."
            )
        owner[ids[0]] = word
    return tuple(owner)


def list_options(line: str, names: Sequence[str], texts: Sequence[str], heading: str = "") -> str:
    """Return options written out, one a line: ``list_options("{letter}) {text}", "AB", ("red", "blue"))``.

    Args:
        line: how one option is listed, with ``{letter}`` and ``{text}``.
        names: what each is called; no shorter than the texts.
        texts: the options.
        heading: a line above them.
    """
    # the text last, so that braces in it are not taken for fields
    lines = [line.replace("{letter}", name).replace("{text}", text) for name, text in zip(names, texts, strict=False)]
    return "\n".join([heading, *lines] if heading else lines)


def label_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, words: Sequence[str], separator: str | None
) -> tuple[int, ...]:
    """Return the vocabulary rows of the labels: `first_tokens`, or `lone_tokens` without a separator."""
    if separator is None:
        return lone_tokens(tokenizer, words)
    return first_tokens(tokenizer, template, words, separator)


def lone_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[int, ...]:
    """Return the last token of each word as the tokenizer writes it without a prompt; released code takes labels so.

    Usage: ``lone_tokens(tokenizer, ("A", "B"))``.

    Raises:
        ValueError: a word that is empty or unknown to the tokenizer, or two with the same last token.
    """
    found: dict[int, str] = {}
    for word, ids in zip(words, tokenizer(list(words), add_special_tokens=False).input_ids, strict=True):
        if not ids:
            raise ValueError(f"The label {word!r} is empty; give every label a word. Labels: {list(words)}.")
        if ids[-1] == tokenizer.unk_token_id:
            raise ValueError(f"The label {word!r} is not in the tokenizer's vocabulary; use another word.")
        if ids[-1] in found:
            raise ValueError(
                f"The labels {found[ids[-1]]!r} and {word!r} end in the same token, so the model cannot tell them apart; use "
                "another word for one of them."
            )
        found[ids[-1]] = word
    return tuple(found)


def shorten(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], rooms: Sequence[int], side: str = "left"
) -> list[list[int]]:
    """Return the prompts cut to the room each has, from the left, so that the question and its cue stay.

    Usage: ``shorten(tokenizer, ids, [300] * len(ids))``. A beginning-of-sequence token stays too. Logs how
    many were cut. With ``side="right"`` the end is lost instead, as in released code.
    """
    shortened = []
    for ids, room in zip(prompts, rooms, strict=True):
        if len(ids) > room and side == "right":
            ids = ids[:room]
        elif len(ids) > room:
            head = ids[:1] if room > 1 and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []
            ids = head + ids[len(ids) - room + len(head) :]
        shortened.append(ids)
    cut = sum(len(short) < len(ids) for short, ids in zip(shortened, prompts, strict=True))
    if cut:
        lost = "end" if side == "right" else "beginning"
        logger.warning("%d of %d prompts were longer than max_length and lost their %s", cut, len(prompts), lost)
    return shortened
