"""Prompts in which a title is followed by a slot for the item's embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyrolora.models.tasks.example import Example
from pyrolora.models.tasks.option_scoring import OptionScoring
from pyrolora.models.tasks.prompts import EncodedRow, template_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# field of an example -> the vector with the numbers of the items that it lists, one a line
LISTED = {"history": "history_items", "candidates": "candidate_items"}


@dataclass(frozen=True)
class HybridScoring(OptionScoring):
    r"""`OptionScoring` whose listed titles are each followed by a slot, one token that an item's embedding is added to.

    Usage: ``HybridScoring("Watched:\n{history}\nChoose from:\n{candidates}\nChoice:", slot="<file_sep>")`` with the adapter
    `ItemProjector`, which says what the embedding of a slot is; without it slots are their plain token.

    Source: Liao et al., "LLaRA: Large Language-Recommendation Assistant", 2024, section 3.2 (hybrid prompting).

    Args:
        template: see `OptionScoring`; ``{history}`` and ``{candidates}`` list one item a line.
        normalise: see `OptionScoring`.
        separator: see `OptionScoring`.
        blank: see `OptionScoring`.
        ending: see `OptionScoring`.
        slot: text that the tokenizer writes as one token and that no title holds, such as a special token.
    """

    slot: str = "<file_sep>"

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
    ) -> list[EncodedRow]:
        """See `OptionScoring.encode`; rows also say which item each slot stands for.

        Raises:
            ValueError: a slot that is no single token, an example without item numbers, or other many slots than items.
        """
        ids = tokenizer(self.slot, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer writes the slot {self.slot!r} as {tokenizer.convert_ids_to_tokens(ids)}, expected one token "
                "of its own. Take one of its special tokens."
            )
        listed = [name for name in template_fields(self.template) if name in LISTED]
        rows = super().encode(tokenizer, [self._with_slots(example, listed) for example in examples], max_length)
        for example, row in zip(examples, rows, strict=True):
            items = [number for name in listed for number in example.vectors[LISTED[name]].tolist() if number >= 0]
            places = [
                place for place, token in enumerate(row.input_ids) if token == ids[0] and row.segment_ids[place] == 1
            ]
            if len(places) > len(items) or (len(places) < len(items) and len(row.position_ids) < max_length):
                raise ValueError(
                    f"The prompt of example {example.id!r} has {len(places)} slots for {len(items)} items; does a title hold "
                    f"{self.slot!r}? Choose another slot."
                )
            row.items.extend([-1] * len(row))
            # a prompt that was cut lost its first slots
            for place, number in zip(places, items[len(items) - len(places) :], strict=True):
                row.items[place] = number
        return rows

    def _with_slots(self, example: Example, listed: Sequence[str]) -> Example:
        fields = dict(example.fields)
        for name in listed:
            if LISTED[name] not in example.vectors:
                raise ValueError(
                    f"Example {example.id!r} has no numbers of the items in {name!r} (vectors[{LISTED[name]!r}]). Prepare "
                    "the data with pyrolora windows, or use a task without slots."
                )
            fields[name] = "\n".join(f"{line} {self.slot}" for line in fields[name].split("\n"))
        return replace(example, fields=fields)
