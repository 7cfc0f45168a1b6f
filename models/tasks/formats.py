"""The ways to ask: label words after a prompt, letters of listed options, or each option's likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pyrolora.models.tasks.example import Example
from pyrolora.models.tasks.option_scoring import OptionScoring
from pyrolora.models.tasks.prompts import (
    EncodedRow,
    fill,
    label_tokens,
    list_options,
    shorten,
    template_fields,
    token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Format", "Letter", "OptionScoring", "Verbaliser"]


class Format(Protocol):
    """What a way of asking must offer."""

    @property
    def kind(self) -> Literal["label", "option", "image", "episode"]:
        """Whether classes are vocabulary rows at the last position, options to be scored, or classes of images."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of an example that the prompt shows."""

    def prompt(self, example: Example) -> str:
        """Return the text before the answer."""

    def label_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Return the vocabulary row of each class; empty where options are scored."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
    ) -> list[EncodedRow]:
        """Return the token ids of each example."""


@dataclass(frozen=True)
class Verbaliser:
    r"""A word for each class, read off the distribution of the token after the prompt.

    Usage: ``Verbaliser("News headline: {text}\nTopic:", labels=(" business", " sport"))``.

    A word is written as it follows the prompt. One that starts without white space after a prompt that ends
    without it gets `separator` between them, so ``"sport"`` and ``" sport"`` are the same label; set it to ""
    for a script without spaces. Only the first token of a word is compared, so a word may have several tokens
    as long as no two words share the first.

    Source: Schick and Schuetze (2021), "Exploiting Cloze-Questions for Few-Shot Text Classification".

    Args:
        template: the prompt, with field names in braces.
        labels: the words, one a class, in the order of the classes.
        separator: what stands between prompt and word when neither has white space there; None takes the last token that a
            word has by itself, whatever it would be after the prompt.
        ended: whether an end-of-sequence token follows the prompt, after which the answer is read; released code does so
            for some tasks.
        truncation: the side on which a prompt that is too long is cut, ``"left"`` or ``"right"``.
    """

    kind: ClassVar[Literal["label"]] = "label"

    template: str
    labels: tuple[str, ...]
    separator: str | None = " "
    ended: bool = False
    truncation: str = "left"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        template_fields(self.template)
        _check_truncation(self.truncation)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of an example that the prompt shows."""
        return template_fields(self.template)

    def prompt(self, example: Example) -> str:
        """Return the text before the answer."""
        return fill(self.template, example)

    def label_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Return the first token of each label word, in the order of the classes.

        Raises:
            ValueError: a word that is empty, unknown or split after white space, or two that share their
                first token.
        """
        return label_tokens(tokenizer, self.template, self.labels, self.separator)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
    ) -> list[EncodedRow]:
        """Return the token ids of each prompt.

        Args:
            tokenizer: of the backbone.
            examples: of this task or of another one with the same fields.
            max_length: tokens; a longer prompt is cut.
        """
        prompts = [self.prompt(example) for example in examples]
        return _prompt_rows(tokenizer, prompts, max_length, self.ended, self.truncation)


@dataclass(frozen=True)
class Letter:
    r"""Options listed as ``A) ...``, and the answer read off the distribution over the letters.

    Usage: ``Letter("Question: {question}\n{options}\nAnswer:")``.

    A small model is near chance in this form (SmolLM2-135M: 0.26 to 0.32 of four options); see
    `OptionScoring`. An example that brings its options written out, in the field ``listing``, shows those as they are.

    Args:
        template: the prompt; ``{options}`` stands for the listed options, one a line.
        letters: one for each position an option can have.
        option: how one option is listed, with ``{letter}`` and ``{text}``.
        heading: a line above the options.
        separator: what stands between prompt and letter when the prompt ends without white space; None as in `Verbaliser`.
        ended: whether an end-of-sequence token follows the prompt, after which the answer is read.
        truncation: see `Verbaliser`.
    """

    kind: ClassVar[Literal["label"]] = "label"

    template: str = "Question: {question}\n{options}\nAnswer:"
    letters: tuple[str, ...] = ("A", "B", "C", "D")
    option: str = "{letter}) {text}"
    heading: str = ""
    separator: str | None = " "
    ended: bool = False
    truncation: str = "left"

    def __post_init__(self) -> None:
        object.__setattr__(self, "letters", tuple(self.letters))
        _check_truncation(self.truncation)
        if "options" not in template_fields(self.template):
            raise ValueError(
                f"The template {self.template!r} shows no options; put {{options}} where they are to be listed."
            )
        if sorted(template_fields(self.option)) != ["letter", "text"]:
            raise ValueError(
                f"The option {self.option!r} must show {{letter}} and {{text}}, as in '{{letter}}) {{text}}'."
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes: the letters."""
        return self.letters

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of an example that the prompt shows."""
        return tuple(name for name in template_fields(self.template) if name != "options")

    def prompt(self, example: Example) -> str:
        """Return the text before the answer.

        Raises:
            ValueError: an example without options, or with more than there are letters.
        """
        if "listing" in example.fields:
            return fill(self.template, example, {"options": example.fields["listing"]})
        if not example.options or len(example.options) > len(self.letters):
            raise ValueError(
                f"Example {example.id!r} has {len(example.options)} options, expected 1 to "
                f"{len(self.letters)} for the letters "
                f"{', '.join(self.letters)}. Give Letter(letters=...) more of them, or use a Verbaliser for "
                "plain texts."
            )
        listed = list_options(self.option, self.letters, example.options, self.heading)
        return fill(self.template, example, {"options": listed})

    def label_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Return the token of each letter after the prompt.

        Raises:
            ValueError: two letters share their token, or one is unknown to the tokenizer.
        """
        return label_tokens(tokenizer, self.template, self.letters, self.separator)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
    ) -> list[EncodedRow]:
        """Return the token ids of each prompt.

        Args:
            tokenizer: of the backbone.
            examples: with options.
            max_length: tokens; a longer prompt is cut.
        """
        prompts = [self.prompt(example) for example in examples]
        return _prompt_rows(tokenizer, prompts, max_length, self.ended, self.truncation)


def _check_truncation(side: str) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"truncation={side!r}, expected 'left' or 'right'.")


def _prompt_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int, ended: bool, truncation: str
) -> list[EncodedRow]:
    if ended and tokenizer.eos_token_id is None:
        raise ValueError(
            "The prompt is to end in an end-of-sequence token, and the tokenizer has none; use ended=False."
        )
    end = [int(tokenizer.eos_token_id)] if ended else []
    ids = shorten(tokenizer, token_ids(tokenizer, prompts), [max_length - len(end)] * len(prompts), truncation)
    return [EncodedRow(row + end, [], [], [], []) for row in ids]
