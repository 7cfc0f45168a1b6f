"""Train, validation and test: disjoint, and taken from the parts of a data set the same way every time.

Random choices rank the examples by a hash of their content. That depends on no library's random stream, no
file system and no row order, so a held-out set is the same on every machine and for every seed of the user.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyrolora.models.tasks.example import Example

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitRule:
    """Which part of the data set becomes train, validation and test.

    Usage: ``SplitRule(train="all", validation=300, test=600)`` holds 900 examples out of one file;
    ``SplitRule()`` takes the official three.

    Args:
        train: the part to train on.
        validation: the part to choose on, or how many examples to hold out of `train` for it.
        test: the part to report on, or how many examples to hold out of `train` for it. Where the official
            test rows have no labels, the official validation part is the test and validation is held out of
            train.
        unique: drop exact duplicates (and texts whose copies carry different labels) before anything else.
        group: examples with an equal group are never divided between two splits; by default their content.
        optional: parts that a copy of the data set may lack.
    """

    train: str = "train"
    validation: str | int = "validation"
    test: str | int = "test"
    unique: bool = False
    group: Callable[[Example], str] = lambda example: example.content
    optional: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that must be read."""
        named = (part for part in (self.train, self.validation, self.test) if isinstance(part, str))
        return tuple(dict.fromkeys(named))

    def divide(self, parts: Mapping[str, Sequence[Example]]) -> dict[str, tuple[Example, ...]]:
        """Return the three splits.

        What a later split also holds is taken from the earlier one: an official test set keeps its rows.

        Args:
            parts: the examples of every part that `parts` names.

        Raises:
            ValueError: fewer examples than are to be held out.
        """
        train = without_duplicates(parts[self.train]) if self.unique else list(parts[self.train])
        held: dict[str, list[Example]] = {}
        for name, choice in (("test", self.test), ("validation", self.validation)):
            if isinstance(choice, str):
                held[name] = list(parts[choice])
            else:
                held[name], train = hold_out(train, choice, name, self.group)
        validation = _without(held["validation"], held["test"], "validation")
        train = _without(train, [*validation, *held["test"]], "train")
        return {"train": tuple(train), "validation": tuple(validation), "test": tuple(held["test"])}


def rank(examples: Iterable[Example], seed: Hashable) -> list[Example]:
    """Return the examples in the pseudo-random order of a seed, whatever order they came in."""

    def position(example: Example) -> str:
        return _digest(seed, f"{example.id}\x1f{example.content}")

    return sorted(examples, key=position)


def choose(examples: Sequence[Example], size: int, seed: int) -> tuple[Example, ...]:
    """Return `size` of the examples, in equal proportion from each class where the labels are classes.

    Usage: ``choose(split.examples, 300, seed=0)``.

    Args:
        examples: what to choose from.
        size: how many, from 1 to all of them.
        seed: a different seed gives a different choice.
    """
    strata = _strata(examples)
    taken = quotas(size, {stratum: len(members) for stratum, members in strata.items()})
    chosen = [example for stratum, members in strata.items() for example in rank(members, seed)[: taken[stratum]]]
    return tuple(rank(chosen, seed))


def quotas(size: int, counts: Mapping[int, int]) -> dict[int, int]:
    """Return how many of `size` each stratum gives: proportional, with the largest remainders rounded up."""
    total = sum(counts.values())
    shares = {stratum: size * count / total for stratum, count in counts.items()}
    taken = {stratum: int(share) for stratum, share in shares.items()}
    by_remainder = sorted(counts, key=lambda stratum: (taken[stratum] - shares[stratum], stratum))
    for stratum in by_remainder[: size - sum(taken.values())]:
        taken[stratum] += 1
    return taken


def hold_out(
    examples: Sequence[Example], size: int, name: str, group: Callable[[Example], str]
) -> tuple[list[Example], list[Example]]:
    """Return (held out, rest), whole groups only and in equal proportion from each class.

    Args:
        examples: what to divide.
        size: how many to hold out; a few less where groups do not add up to it.
        name: stands in the hash, so that validation and test are chosen independently.
        group: examples with an equal group stay together.

    Raises:
        ValueError: `size` leaves nothing to train on.
    """
    if not 0 < size < len(examples):
        raise ValueError(
            f"Cannot hold {size} examples out of {len(examples)} for {name}; hold out fewer or give more rows."
        )
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[group(example)].append(example)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: _digest(name, key))]
    left = quotas(size, {stratum: len(members) for stratum, members in _strata(examples).items()})
    held: list[Example] = []
    rest: list[Example] = []
    for members in ordered:
        stratum = _stratum(members[0])
        fits = len(members) <= left[stratum]
        (held if fits else rest).extend(rank(members, name))
        left[stratum] -= len(members) if fits else 0
    return held, rest


def without_duplicates(examples: Sequence[Example]) -> list[Example]:
    """Return one example per content, and none where the copies carry different labels."""
    labels: dict[str, set[int]] = defaultdict(set)
    for example in examples:
        labels[example.content].add(example.label)
    kept: dict[str, Example] = {}
    for example in examples:
        if len(labels[example.content]) == 1:
            kept.setdefault(example.content, example)
    return list(kept.values())


def _without(examples: list[Example], later: list[Example], name: str) -> list[Example]:
    seen = {example.content for example in later}
    kept = [example for example in examples if example.content not in seen]
    if len(kept) < len(examples):
        logger.info("%d examples left out of %s: they also stand in a later split", len(examples) - len(kept), name)
    return kept


def _strata(examples: Iterable[Example]) -> dict[int, list[Example]]:
    strata: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        strata[_stratum(example)].append(example)
    return dict(sorted(strata.items()))


def _stratum(example: Example) -> int:
    # with options, the label is only the place where the right one happens to stand
    return 0 if example.options else example.label


def _digest(seed: Hashable, key: str) -> str:
    return hashlib.sha256(f"{seed}\x1f{key}".encode()).hexdigest()
