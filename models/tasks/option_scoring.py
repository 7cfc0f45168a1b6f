"""Option scoring: which option the model finds most likely after the prompt, all of them in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pyrolora.models.naming import suggestion
from pyrolora.models.tasks.example import Example
from pyrolora.models.tasks.prompts import (
    EncodedRow,
    continuation_ids,
    fill,
    shorten,
    spaced,
    template_fields,
    token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMALISERS = ("token", "character", "none")


@dataclass(frozen=True)
class OptionScoring:
    r"""Length-normalised log-likelihood of each option after the prompt.

    Usage: ``OptionScoring("Question: {question}\nAnswer:", normalise="character")``.

    The prompt stands once in a row, followed by every option; `segment_ids` says which token belongs to
    which, so that an attention mask can let every option see the prompt and itself but no other option, and
    `position_ids` restart right after the prompt. Under that mask the scores are those of one row an option,
    at the cost of one prompt.

    With `blank`, the options are put in its place in the sentence. What precedes the blank is the prompt, and
    what follows it is scored given each option ("partial scoring"), which takes out how likely the option
    itself is.

    Source: Brown et al. (2020), "Language Models are Few-Shot Learners", section 2.4 (normalisation); Trinh
    and
    Le (2018), "A Simple Method for Commonsense Reasoning" (partial scoring).

    Args:
        template: the prompt, with field names in braces.
        normalise: divide the sum of log-likelihoods by the number of scored tokens ("token") or characters
            ("character"), or by one ("none").
        separator: what stands between prompt and option when neither has white space there.
        blank: the sign in the filled template that the options replace, such as ``"_"``.
        ending: what stands after every option and is scored with it, such as a line break, so that an option that another
            one begins with does not always win.
    """

    kind: ClassVar[Literal["option"]] = "option"

    template: str
    normalise: Literal["token", "character", "none"] = "token"
    separator: str = " "
    blank: str | None = None
    ending: str = ""

    def __post_init__(self) -> None:
        template_fields(self.template)
        if self.normalise not in NORMALISERS:
            raise ValueError(
                f"normalise={self.normalise!r}, expected one of {', '.join(NORMALISERS)}."
                f"{suggestion(str(self.normalise), NORMALISERS)}"
            )
        if self.blank == "":
            raise ValueError("blank='' marks no place; give the sign that the options replace, or None.")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of an example that the prompt shows."""
        return template_fields(self.template)

    def label_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Return nothing: the classes are options, not vocabulary rows."""
        return ()

    def prompt(self, example: Example) -> str:
        """Return the text that all options share.

        Raises:
            ValueError: a missing field, or not exactly one blank.
        """
        return self._parts(example)[0]

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
    ) -> list[EncodedRow]:
        """Return the token ids of each prompt followed by its options.

        Args:
            tokenizer: of the backbone.
            examples: each with two options or more.
            max_length: tokens of the prompt and the longest option together; a longer prompt loses its
                beginning.

        Raises:
            ValueError: fewer than two options, an option of no tokens, or one that alone reaches
                `max_length`.
        """
        prompts, before, after, owners = [], [], [], []
        for number, example in enumerate(examples):
            prompt, given, scored = self._parts(example)
            prompts.append(prompt)
            for option in range(len(scored)):
                before.append(prompt + given[option])
                after.append(scored[option])
                owners.append(number)
        # two steps, so that the boundary between what is given and what is scored falls between tokens
        given_ids = continuation_ids(
            tokenizer,
            [prompts[owner] for owner in owners],
            [text[len(prompts[owner]) :] for owner, text in zip(owners, before, strict=True)],
        )
        scored_ids = continuation_ids(tokenizer, before, after)
        options: list[list[tuple[list[int], list[int], str]]] = [[] for _ in examples]
        for owner, given_tokens, scored_tokens, text in zip(owners, given_ids, scored_ids, after, strict=True):
            if not scored_tokens:
                raise ValueError(
                    f"Example {examples[owner].id!r} has an option with no text to score. Fill it in; with a "
                    "blank, something "
                    "must follow it in the sentence."
                )
            options[owner].append((given_tokens, scored_tokens, text))
        rooms = []
        for example, choices in zip(examples, options, strict=True):
            longest = max(len(given_tokens) + len(scored_tokens) for given_tokens, scored_tokens, _ in choices)
            if longest >= max_length:
                raise ValueError(
                    f"Example {example.id!r} has an option of {longest} tokens, which leaves no room for the "
                    "prompt in "
                    f"max_length={max_length}. Raise max_length."
                )
            rooms.append(max_length - longest)
        shared = shorten(tokenizer, token_ids(tokenizer, prompts), rooms)
        return [self._row(prompt, choices) for prompt, choices in zip(shared, options, strict=True)]

    def _parts(self, example: Example) -> tuple[str, list[str], list[str]]:
        """Return the shared prompt and, for each option, what follows unscored and what follows scored."""
        if len(example.options) < 2:
            raise ValueError(
                f"Example {example.id!r} has {len(example.options)} options, expected two or more to score. "
                "Use a Verbaliser for texts with a class."
            )
        text = fill(self.template, example)
        if self.blank is None:
            if not text.strip():
                raise ValueError(
                    f"Example {example.id!r} has an empty prompt; nothing would predict the options' first token."
                )
            return (
                text,
                [""] * len(example.options),
                [spaced(text, option + self.ending, self.separator) for option in example.options],
            )
        if text.count(self.blank) != 1:
            raise ValueError(
                f"Example {example.id!r} has {text.count(self.blank)} blanks {self.blank!r} in {text!r}, "
                "expected exactly one."
            )
        before, rest = text.split(self.blank)
        # the space before the blank belongs to the option's first word, as tokenizers have it
        prompt = before.rstrip(" ")
        gap = before[len(prompt) :]
        return prompt, [gap + option for option in example.options], [rest + self.ending] * len(example.options)

    def _row(self, prompt: list[int], options: list[tuple[list[int], list[int], str]]) -> EncodedRow:
        row = EncodedRow(list(prompt), [1] * len(prompt), list(range(len(prompt))), [False] * len(prompt), [])
        for number, (given, scored, text) in enumerate(options):
            length = len(given) + len(scored)
            row.input_ids.extend(given + scored)
            row.segment_ids.extend([2 + number] * length)
            row.position_ids.extend(range(len(prompt), len(prompt) + length))
            row.scored.extend([False] * len(given) + [True] * len(scored))
            sizes = {"token": len(scored), "character": len(text.strip()), "none": 1}
            row.option_lengths.append(float(sizes[self.normalise]))
        return row
